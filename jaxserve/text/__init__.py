"""Text on the caller's side: detokenization, stop strings, chat templates. Imports no jax."""
