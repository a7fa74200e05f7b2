"""Reading a text into a cache and continuing it: the work of the commands `generate`, `cache` and `ask`."""

from hyperattention.extras import need

need("transformers", "safetensors")
