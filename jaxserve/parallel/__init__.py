"""On which devices an engine runs, and what of it lies where."""
