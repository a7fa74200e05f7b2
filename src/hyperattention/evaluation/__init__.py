"""Evaluation of compressed caches: generated tasks, answered by a model that reads the task through the cache."""

from hyperattention.extras import need

need("transformers", "safetensors")
