"""The reference model: small, embedded, and trained to retrieve, so that an evaluation on it cannot reward dropping keys."""

from hyperattention.extras import need

need("transformers", "safetensors")
