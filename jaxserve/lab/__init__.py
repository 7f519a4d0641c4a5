"""Sequences as values: see `lab.Lab`, and docs/guide/lab.md."""
