"""Logit processors on the host, as SGLang has them. No jax."""
