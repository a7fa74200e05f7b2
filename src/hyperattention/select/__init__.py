"""The choice of keys for each tile: stages, densities of draws, rankings of blocks, and their parts."""

from hyperattention.select.density import Density, Distribution, Uniform
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.universal_set import UniversalSet
from hyperattention.select.locate.window import Window
from hyperattention.select.score.block_score import BlockScore
from hyperattention.select.score.blocks import BlockRank, KeyBounds, KeySketch, MeanKey
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan
from hyperattention.select.score.level import Level
from hyperattention.select.score.leverage_score import LeverageScore
from hyperattention.select.score.mix import Mix
from hyperattention.select.score.pooling import Coarse
from hyperattention.select.score.representatives import Representatives
from hyperattention.select.score.value_norm import ValueNorm
from hyperattention.select.stage import LookAhead, Stage

__all__ = [
    "BlockRank",
    "BlockScore",
    "Coarse",
    "Density",
    "Distribution",
    "Draw",
    "DrawAlike",
    "HashBuckets",
    "HierarchicalSearch",
    "KeyBounds",
    "KeyScan",
    "KeySketch",
    "Level",
    "LeverageScore",
    "LookAhead",
    "MeanKey",
    "Mix",
    "Representatives",
    "Sinks",
    "Stage",
    "TopBlocks",
    "Uniform",
    "UniversalSet",
    "ValueNorm",
    "Window",
]
