"""Attention within a given error: the cheapest method whose error is certified on fresh exact rows."""
