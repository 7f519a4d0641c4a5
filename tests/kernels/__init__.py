"""What the kernel tests share. Needs jax, numpy and pytest only."""
