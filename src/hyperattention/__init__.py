"""Attention over long contexts in near-linear time, with a measured error bar."""

from hyperattention.attention import attention
from hyperattention.cache.page_rank import Bounds, Midpoint, TwoLevels
from hyperattention.coreset import Coreset
from hyperattention.error.audit import ErrorReport, audit
from hyperattention.error.tolerance.ladder import Ladder, default_ladder
from hyperattention.error.tolerance.report import ToleranceReport
from hyperattention.files.plan import Plan
from hyperattention.files.plan_file import load_plan, save_plan
from hyperattention.layouts.packed import varlen_attention
from hyperattention.layouts.paged import paged_attention
from hyperattention.merge import merge
from hyperattention.methods.base import Cost
from hyperattention.methods.by_head import ByHead
from hyperattention.methods.by_layer import ByLayer
from hyperattention.methods.default import default_method, lean_method, thorough_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.oracle import TopKeys
from hyperattention.methods.presets import HyperAttention
from hyperattention.policies.balanced_halving import BalancedHalving
from hyperattention.policies.cluster_centres import ClusterCentres
from hyperattention.policies.cluster_means import ClusterMeans
from hyperattention.policies.heavy_hitters import HeavyHitters
from hyperattention.policies.last_window import LastWindow
from hyperattention.policies.latest import Latest
from hyperattention.policies.leverage import Leverage
from hyperattention.policies.look_once import LookOnce
from hyperattention.policies.subgen import SubGen
from hyperattention.policies.top_pages import TopPages
from hyperattention.policies.uniform_sample import RandomKeys, UniformSample
from hyperattention.rivals.anti_diagonal import AntiDiagonal
from hyperattention.rivals.budgeted_draw import BudgetedDraw
from hyperattention.rivals.collision_draw import CollisionDraw
from hyperattention.rivals.priority_draw import PriorityDraw
from hyperattention.rivals.vertical_slash import VerticalSlash
from hyperattention.select.density import Uniform
from hyperattention.select.draw import Draw
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.universal_set import UniversalSet
from hyperattention.select.locate.window import Window
from hyperattention.select.score.block_score import BlockScore
from hyperattention.select.score.blocks import KeyBounds, KeySketch, MeanKey
from hyperattention.select.score.descent import Descent
from hyperattention.select.score.key_scan import KeyScan
from hyperattention.select.score.level import Level
from hyperattention.select.score.mix import Mix
from hyperattention.select.score.pooling import Coarse
from hyperattention.select.score.representatives import Representatives
from hyperattention.select.score.value_norm import ValueNorm
from hyperattention.select.stage import LookAhead
from hyperattention.types import Partial

__all__ = [
    "AntiDiagonal",
    "BalancedHalving",
    "BlockScore",
    "Bounds",
    "BudgetedDraw",
    "ByHead",
    "ByLayer",
    "ClusterCentres",
    "ClusterMeans",
    "Coarse",
    "CollisionDraw",
    "Coreset",
    "Cost",
    "Descent",
    "Draw",
    "ErrorReport",
    "Exact",
    "HashBuckets",
    "HeavyHitters",
    "HyperAttention",
    "KeyBounds",
    "KeyScan",
    "KeySketch",
    "Ladder",
    "LastWindow",
    "Latest",
    "Level",
    "Leverage",
    "LookAhead",
    "LookOnce",
    "MeanKey",
    "Method",
    "Midpoint",
    "Mix",
    "Partial",
    "Plan",
    "PriorityDraw",
    "RandomKeys",
    "Representatives",
    "Sinks",
    "SubGen",
    "ToleranceReport",
    "TopBlocks",
    "TopKeys",
    "TopPages",
    "TwoLevels",
    "Uniform",
    "UniformSample",
    "UniversalSet",
    "ValueNorm",
    "VerticalSlash",
    "Window",
    "attention",
    "audit",
    "default_ladder",
    "default_method",
    "lean_method",
    "load_plan",
    "merge",
    "paged_attention",
    "save_plan",
    "thorough_method",
    "varlen_attention",
]
