"""One training method a file; TRL renames often, and only these files know its names."""
