"""Attention without a cache or causality: of pictures' patches, each within its range."""
