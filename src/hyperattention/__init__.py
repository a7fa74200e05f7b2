"""Attention over long contexts in near-linear time, with a measured error bar."""

from hyperattention.attention import attention, varlen_attention
from hyperattention.audit import ErrorReport, audit
from hyperattention.default import default_method
from hyperattention.exact_method import Exact
from hyperattention.method import Cost, Method
from hyperattention.select.draw import Draw, Uniform
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.blocks import KeyBounds, KeySketch, MeanKey
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial

__all__ = [
    "Cost",
    "Draw",
    "ErrorReport",
    "Exact",
    "KeyBounds",
    "KeySketch",
    "LookAhead",
    "MeanKey",
    "Method",
    "Partial",
    "Sinks",
    "TopBlocks",
    "Uniform",
    "Window",
    "attention",
    "audit",
    "default_method",
    "varlen_attention",
]
