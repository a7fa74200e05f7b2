"""Adapters to other libraries. Importing an adapter loads its library; importing `hyperattention` does not."""

from hyperattention.extras import need

need("transformers", "safetensors")
