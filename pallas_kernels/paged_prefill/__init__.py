"""Causal attention of packed new tokens over their sequences' paged keys and values."""
