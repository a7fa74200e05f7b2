"""Modules: layers of a network that compute attention by any method of this library, and one with weights of its own."""

from hyperattention.nn.multihead_attention import MultiheadAttention
from hyperattention.nn.poly_sketch_attention import PolySketchAttention
from hyperattention.nn.poly_sketch_state import PolySketchState

__all__ = ["MultiheadAttention", "PolySketchAttention", "PolySketchState"]
