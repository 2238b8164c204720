"""Example data that ships with the wheel."""
