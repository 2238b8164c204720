"""Compare what was exported with what was trained."""
