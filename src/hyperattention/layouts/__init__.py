"""Attention over other layouts of keys: pages, and packed sequences."""
