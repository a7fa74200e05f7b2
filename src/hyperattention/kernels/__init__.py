"""Kernels: arithmetic only. They have no policy, no randomness and no defaults; the stages decide what is computed."""
