"""Quantizations: the table of types, the kernels that write them, and importance matrices."""
