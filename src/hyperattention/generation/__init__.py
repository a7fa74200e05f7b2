"""Texts read once through a cache, and continued: what the commands `generate`, `cache` and `ask` do."""

from hyperattention.extras import need

need("transformers", "safetensors")
