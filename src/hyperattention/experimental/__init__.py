"""Specified and tested, but used by no stage yet; may change without notice."""
