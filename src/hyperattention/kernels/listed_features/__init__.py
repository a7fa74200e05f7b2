"""Attention over listed keys whose weights are products of features: what a low-rank part says about these keys."""
