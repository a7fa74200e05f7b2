"""How good a compressed cache is: tasks made here, asked of a model that reads them through the cache."""

from hyperattention.extras import need

need("transformers", "safetensors")
