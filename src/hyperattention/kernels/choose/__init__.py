"""The fused parts of a choice of keys: the operators and their Triton kernels."""
