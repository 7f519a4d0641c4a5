"""Product with a weight matrix, fused with the norm before it and what is added after it."""
