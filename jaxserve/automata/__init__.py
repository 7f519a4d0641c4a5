"""Regular expressions as tables over a vocabulary. No jax."""
