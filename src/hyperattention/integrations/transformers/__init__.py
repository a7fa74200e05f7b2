"""Approximate attention and compressed caches in Hugging Face transformers models. The import itself changes nothing."""

from hyperattention.integrations.transformers.cache import HyperCache
from hyperattention.integrations.transformers.counts import CallCounter, CallCounts
from hyperattention.integrations.transformers.switch import NAME, register, use

__all__ = ["NAME", "CallCounter", "CallCounts", "HyperCache", "register", "use"]
