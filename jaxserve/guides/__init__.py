"""What decides on the host about a request's next token. No jax."""
