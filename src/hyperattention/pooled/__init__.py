"""Attention in two levels: each chunk of queries reads its own keys, and a few weighted keys drawn from all others."""
