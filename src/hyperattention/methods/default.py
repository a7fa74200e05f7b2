"""The method that runs if none is named: exact attention below the measured crossover, the default method above it."""

import torch

from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.level import Level
from hyperattention.select.score.representatives import Representatives

# keys from which the default method runs: the measured break-even with SDPA on two CPU threads (docs/log.md)
CROSSOVER = 32_768
# the same for the thorough method, and for the lean one
THOROUGH_CROSSOVER = 40_960
LEAN_CROSSOVER = 4096
# the same of all three on a GPU: the lean method on an H100 was 0.80 times as fast as cuDNN at 32,768 keys, and 2.2 times at
# 65,536 (records/gpu.jsonl). No card has run the default yet: four times the length from which it should save time by the
# prices of docs/performance.md
GPU_CROSSOVER = 65_536
FEW_QUERIES = 256
# keys from which the lean method searches with fewer products
_LEAN_LEVELS_FROM = 131_072
# levels that cost 65 to 100 products per query between 131,072 and a million keys, and 140 at eight million
_FEW_LEVELS = (
    Level(65_536, 16, Representatives(2, 4)),
    Level(4096, 12, Representatives(1, 2)),
    Level(256, 12, Representatives(1, 2)),
    Level(16, 8, Representatives(1, 1)),
)


def default_method(
    num_keys: int, *, num_queries: int | None = None, device: torch.device | str | None = None
) -> AttentionMethod:
    """Return the method that `method=None` runs.

    On every device, queries that look for similar keys share draws (`DrawAlike`). A GPU sorts and draws in kernels, which no
    card has run yet (docs/performance.md).

    Args:
        num_keys: keys of the call.
        num_queries: queries of the call, as many as keys if None; few queries, as in decoding, run exact attention.
        device: device of the call's tensors, the CPU if None; on a GPU exact attention is faster up to longer lengths.

    Returns:
        exact attention below the crossover; from there on the default list of stages, which is the same at every length.
    """
    if not _pays(num_keys, num_queries, device, CROSSOVER):
        return Exact()
    return Method(Sinks(16), Window(192), DrawAlike(640, pooled=16), tile=128)


def thorough_method(
    num_keys: int, *, num_queries: int | None = None, device: torch.device | str | None = None
) -> AttentionMethod:
    """Return a method for calls where a missed key matters more than time: nearly twice as many draws as the default.

    Args:
        num_keys: keys of the call.
        num_queries: queries of the call, as many as keys if None.
        device: device of the call's tensors, the CPU if None.

    Returns:
        exact attention below a crossover, on a CPU a longer one than the default method's; the list of stages from there on.
    """
    if not _pays(num_keys, num_queries, device, THOROUGH_CROSSOVER):
        return Exact()
    return Method(Sinks(16), Window(192), DrawAlike(1216, pooled=16), tile=128)


def lean_method(
    num_keys: int, *, num_queries: int | None = None, device: torch.device | str | None = None
) -> AttentionMethod:
    """Return a method for speed: blocks of keys are searched, by averages of four queries, and few keys are scored.

    It takes a quarter of the default's time on a CPU at 32,768 tokens, and loses more: a key that only a single query needs
    is missed more often. From 131,072 keys on fewer blocks are opened, with fewer representatives, by four averaged queries
    per tile: choosing keys then takes a tenth of the time of attention itself.

    Args:
        num_keys: keys of the call.
        num_queries: queries of the call, as many as keys if None.
        device: device of the call's tensors, the CPU if None.

    Returns:
        exact attention below its crossover, the list of stages from there on.
    """
    if not _pays(num_keys, num_queries, device, LEAN_CROSSOVER):
        return Exact()
    if num_keys < _LEAN_LEVELS_FROM:
        return Method(Sinks(16), Window(256), Draw(688, by=HierarchicalSearch()))
    return Method(Sinks(16), Window(256), Draw(688, by=HierarchicalSearch(_FEW_LEVELS, pooled=4)))


def _pays(num_keys: int, num_queries: int | None, device: torch.device | str | None, crossover: int) -> bool:
    """Return whether approximate attention takes less time than exact attention."""
    on_gpu = device is not None and torch.device(device).type == "cuda"
    enough = num_keys >= (GPU_CROSSOVER if on_gpu else crossover)
    return enough and (num_queries is None or num_queries >= FEW_QUERIES)
