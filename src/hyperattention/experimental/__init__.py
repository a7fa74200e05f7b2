"""Experimental parts: specified and tested, but not used by any stage yet; they may change without notice."""
