"""The reference model: small, part of the package, and trained to retrieve facts, so dropped keys increase its loss."""

from hyperattention.extras import need

need("transformers", "safetensors")
