"""Is the adapter better than its base? `evaluate` measures one model; `compare` puts two side by side."""
