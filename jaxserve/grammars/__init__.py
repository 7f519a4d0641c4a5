"""Grammars that a request's text is to match: llguidance says which tokens may come. No jax."""
