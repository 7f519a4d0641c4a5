"""Model families: mathematics as flax.nnx modules. They know no paging, sharding or loading."""
