"""Memory of a training run: what it will take, and what it takes."""
