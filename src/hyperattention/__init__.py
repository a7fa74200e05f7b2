"""Attention over long contexts in near-linear time, with a measured error bar."""

from hyperattention.attention import attention
from hyperattention.audit import ErrorReport, audit
from hyperattention.by_head import ByHead
from hyperattention.default import default_method
from hyperattention.exact_method import Exact
from hyperattention.ladder import Ladder, default_ladder
from hyperattention.merge import merge
from hyperattention.method import Cost, Method
from hyperattention.paged import paged_attention
from hyperattention.presets import HyperAttention
from hyperattention.select.density import Uniform
from hyperattention.select.draw import Draw
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.block_score import BlockScore
from hyperattention.select.score.blocks import KeyBounds, KeySketch, MeanKey
from hyperattention.select.score.descent import Descent
from hyperattention.select.score.level import Level
from hyperattention.select.score.mix import Mix
from hyperattention.select.score.pooling import Coarse
from hyperattention.select.score.representatives import Representatives
from hyperattention.select.score.value_norm import ValueNorm
from hyperattention.select.stage import LookAhead
from hyperattention.tolerance_report import ToleranceReport
from hyperattention.types import Partial
from hyperattention.varlen import varlen_attention

__all__ = [
    "BlockScore",
    "ByHead",
    "Coarse",
    "Cost",
    "Descent",
    "Draw",
    "ErrorReport",
    "Exact",
    "HashBuckets",
    "HyperAttention",
    "KeyBounds",
    "KeySketch",
    "Ladder",
    "Level",
    "LookAhead",
    "MeanKey",
    "Method",
    "Mix",
    "Partial",
    "Representatives",
    "Sinks",
    "ToleranceReport",
    "TopBlocks",
    "Uniform",
    "ValueNorm",
    "Window",
    "attention",
    "audit",
    "default_ladder",
    "default_method",
    "merge",
    "paged_attention",
    "varlen_attention",
]
