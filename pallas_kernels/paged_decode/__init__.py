"""Attention of one new token per row over its paged keys and values."""
