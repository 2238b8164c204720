"""What an export writes: one module per format, and the checks on where the output goes."""
