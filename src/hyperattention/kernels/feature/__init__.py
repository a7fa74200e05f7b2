"""Attention whose weights are powers of products of features: the specification, the operator and its Triton kernels."""
