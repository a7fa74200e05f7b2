"""Scores of keys or blocks of keys, used to rank blocks or to weight draws."""
