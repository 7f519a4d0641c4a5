"""Between two products of a transformer layer: the residual sum and the next RMSNorm."""
