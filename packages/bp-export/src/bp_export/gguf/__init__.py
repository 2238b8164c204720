"""GGUF files: the plan of one, the streaming writer, and a reader of the settings."""
