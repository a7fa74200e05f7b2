"""Fused parts of the choice of keys: operators and their Triton kernels."""
