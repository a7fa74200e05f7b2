"""Adapters to other libraries: each is imported by name and loads its library only then."""

from hyperattention.extras import need

need("transformers", "safetensors")
