"""The method that runs if none is named: exact attention below the measured crossover, the default method above it."""

import torch

from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.select.draw import Draw
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan
from hyperattention.select.score.level import Level
from hyperattention.select.score.representatives import Representatives

# keys from which the default method runs: the measured break-even with SDPA on two CPU threads (docs/log.md)
CROSSOVER = 4096
# the same for the thorough method: 1.2 times as fast as SDPA there (benchmarks/records/pareto.jsonl)
THOROUGH_CROSSOVER = 8192
# the same on a GPU: on an H100 0.80 times as fast as cuDNN at 32,768 keys, 2.2 times at 65,536 (records/gpu.jsonl)
GPU_CROSSOVER = 65_536
FEW_QUERIES = 256
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

    Args:
        num_keys: keys of the call.
        num_queries: queries of the call, as many as keys if None; few queries, as in decoding, run exact attention.
        device: device of the call's tensors, the CPU if None; on a GPU exact attention is faster up to longer lengths.

    Returns:
        exact attention below the crossover; from there on the default list of stages, which is the same at every length.
    """
    if _pays(num_keys, num_queries, device):
        return Method(Sinks(16), Window(256), Draw(688, by=HierarchicalSearch()))
    return Exact()


def thorough_method(
    num_keys: int, *, num_queries: int | None = None, device: torch.device | str | None = None
) -> AttentionMethod:
    """Return a method for calls where a missed key matters more than time: fewer pairs, chosen more carefully.

    While a tile sees no more than 8,192 keys, every key is scored by averages of two neighbouring queries. Beyond that,
    blocks are opened by twice as many averaged queries as in the default method.

    Args:
        num_keys: keys of the call.
        num_queries: queries of the call, as many as keys if None.
        device: device of the call's tensors, the CPU if None.

    Returns:
        exact attention below a crossover that is longer than the default method's; the list of stages from there on.
    """
    if _pays(num_keys, num_queries, device, THOROUGH_CROSSOVER):
        return Method(Sinks(16), Window(128), Draw(611, by=KeyScan(32, beyond=HierarchicalSearch(pooled=32))))
    return Exact()


def lean_method(
    num_keys: int, *, num_queries: int | None = None, device: torch.device | str | None = None
) -> AttentionMethod:
    """Return a method for hundreds of thousands of keys: choosing keys takes a tenth of the time of attention itself.

    Blocks are opened as in the default method, but fewer, with fewer representatives, and by four averaged queries per tile.
    A key that only a single query needs is missed more often.

    Args:
        num_keys: keys of the call.
        num_queries: queries of the call, as many as keys if None.
        device: device of the call's tensors, the CPU if None.

    Returns:
        exact attention below the crossover of the default method, the list of stages from there on.
    """
    if _pays(num_keys, num_queries, device):
        return Method(Sinks(16), Window(256), Draw(688, by=HierarchicalSearch(_FEW_LEVELS, pooled=4)))
    return Exact()


def _pays(num_keys: int, num_queries: int | None, device: torch.device | str | None, crossover: int = CROSSOVER) -> bool:
    """Return whether approximate attention takes less time than exact attention."""
    on_gpu = device is not None and torch.device(device).type == "cuda"
    enough = num_keys >= (GPU_CROSSOVER if on_gpu else crossover)
    return enough and (num_queries is None or num_queries >= FEW_QUERIES)
