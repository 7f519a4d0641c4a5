"""What requests want of registered chains of transforms. No jax."""
