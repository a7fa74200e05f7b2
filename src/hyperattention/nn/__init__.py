"""Modules: layers that train with the attention of this package."""

from hyperattention.nn.poly_sketch_attention import PolySketchAttention
from hyperattention.nn.poly_sketch_state import PolySketchState

__all__ = ["PolySketchAttention", "PolySketchState"]
