"""The training loop's framework-free half, which every rail runs: how long to train, and on which rows."""
