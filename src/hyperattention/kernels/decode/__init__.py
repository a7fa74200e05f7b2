"""Attention of a decoding step over a cache: over all slots of a coreset, or over the best pages of all keys."""
