"""Between the fused projection and attention: head norms, rotary embedding, KV write."""
