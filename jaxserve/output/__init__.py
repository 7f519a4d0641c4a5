"""What leaves the engine: updates from the engine thread, result dicts for the caller."""
