"""Logits to tokens: penalties, biases, temperature, filters, the draw, and logprobs."""
