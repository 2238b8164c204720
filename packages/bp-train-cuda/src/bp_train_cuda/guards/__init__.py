"""What keeps a run going: one guard a file, none of them knows a training method."""
