"""Attention over lists of keys: the specification, the operator and its Triton kernels."""
