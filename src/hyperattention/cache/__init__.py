"""The stores of a compressed KV cache, one for each layer: they append, compress, select and compute attention."""
