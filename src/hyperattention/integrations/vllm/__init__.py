"""Approximate attention in vLLM: an attention backend that vLLM loads as a plugin. Importing this changes nothing."""
