"""Attention over long contexts in near-linear time, with a measured error bar."""

from hyperattention.attention import attention, measured_attention
from hyperattention.cache.policy import Policy
from hyperattention.coreset import Coreset
from hyperattention.error.audit import audit
from hyperattention.error.report import ErrorReport
from hyperattention.error.tolerance.ladder import Ladder, default_ladder
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.files.plan import Plan
from hyperattention.files.plan_file import load_plan, save_plan
from hyperattention.layouts.packed import measured_varlen_attention, varlen_attention
from hyperattention.layouts.paged import measured_paged_attention, paged_attention
from hyperattention.merge import merge
from hyperattention.methods.base import AttentionMethod, Cost
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer
from hyperattention.methods.default import default_method, lean_method, thorough_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.lev_attention import LevAttention
from hyperattention.methods.method import Method
from hyperattention.methods.pooled_chunks import PooledChunks
from hyperattention.methods.presets import HyperAttention
from hyperattention.methods.scatterbrain import Scatterbrain
from hyperattention.result import AttentionResult, SequencesResult
from hyperattention.select.density import Density, Uniform
from hyperattention.select.draw import Draw
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan
from hyperattention.select.stage import LookAhead, Stage
from hyperattention.types import Partial

__version__ = "0.2.0"

__all__ = [
    "AttentionMethod",
    "AttentionResult",
    "ByHead",
    "ByLayer",
    "Coreset",
    "Cost",
    "Density",
    "Draw",
    "ErrorReport",
    "Exact",
    "HashBuckets",
    "HierarchicalSearch",
    "HyperAttention",
    "KeyScan",
    "Ladder",
    "LevAttention",
    "LookAhead",
    "Method",
    "Partial",
    "Plan",
    "Policy",
    "PooledChunks",
    "Scatterbrain",
    "SequencesResult",
    "Sinks",
    "Stage",
    "ToleranceReport",
    "TopBlocks",
    "Uniform",
    "Window",
    "__version__",
    "attention",
    "audit",
    "default_ladder",
    "default_method",
    "lean_method",
    "load_plan",
    "measured_attention",
    "measured_paged_attention",
    "measured_varlen_attention",
    "merge",
    "paged_attention",
    "save_plan",
    "thorough_method",
    "varlen_attention",
]
