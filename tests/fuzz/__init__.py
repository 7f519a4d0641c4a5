"""Random calls and mutated files, seeded: nothing but answers and our own errors, within bounds."""
