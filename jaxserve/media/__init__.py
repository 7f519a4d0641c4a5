"""Pictures in prompts, the host's side: from what a caller gives to patches and to the prompt's
tokens. No jax."""
