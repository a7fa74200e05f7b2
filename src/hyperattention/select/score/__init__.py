"""Scores: a number for each key or block of keys, by which blocks are ranked or draws are weighted."""
