"""Batch jobs on Ray, in an environment that has it: `python -m tests.batch_on_ray [NAME ...]`."""
