"""Kernels: arithmetic only. No policy, no randomness, no defaults; what to compute is decided by the stages."""
