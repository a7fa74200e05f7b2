"""Memory that a choice of keys takes besides its result, on the meta device: a bound holds."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hyperattention as ha
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike, draw_alike
from hyperattention.select.score import pooling

BOUND = 4 * 2**20


class Peak(TorchDispatchMode):
    """Count the bytes of all storages that are made and still alive."""

    def __init__(self):
        super().__init__()
        self.views, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outside = {x.untyped_storage()._cdata for x in given} - self.views.keys()
        for x in tree_leaves(result):
            if not isinstance(x, torch.Tensor) or any(x is y for y in given):
                continue
            storage = x.untyped_storage()
            if storage._cdata in outside:
                continue
            if storage._cdata not in self.views:
                self.views[storage._cdata] = 0
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
            self.views[storage._cdata] += 1
            weakref.finalize(x, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, storage: int, size: int) -> None:
        self.views[storage] -= 1
        if not self.views[storage]:
            del self.views[storage]
            self.now -= size


def beside_the_result(method: ha.Method, num_tokens: int, kv_heads: int, causal: bool) -> int:
    shapes = ((1, heads, num_tokens, 64) for heads in (4, kv_heads, kv_heads))
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    with torch.no_grad(), Peak() as peak:
        kept = method.selections(Problem(q, k, v, 0.125, causal=causal))
        peak.most -= peak.now
    assert kept
    return peak.most


@pytest.mark.parametrize(("stage", "kv_heads", "causal"), [
    (DrawAlike(64, rows=64, pooled=8, most=256, candidates=1), 2, True),
    (DrawAlike(64, rows=64, pooled=8, most=256, candidates=1), 2, False),
    (DrawAlike(64, rows=64, pooled=32, most=512, candidates=1), 1, True),
    (DrawAlike(256, rows=32, pooled=2, most=256, candidates=1), 4, True),
    (DrawAlike(64, rows=64, pooled=8, most=256, candidates=2), 2, True),
    (DrawAlike(64, rows=64, pooled=8, most=256, candidates=2), 2, False),
], ids=["causal", "full", "many averages", "many slots", "more candidates", "more of all keys"])  # fmt: skip
def test_alike_queries_are_sorted_and_scored_in_chunks(monkeypatch, stage, kv_heads, causal):
    monkeypatch.setattr(draw_alike, "triton_reads", lambda *tensors: False)
    monkeypatch.setattr(pooling, "DEVICE_SCORE_BYTES", BOUND)
    method = ha.Method(ha.Sinks(4), ha.Window(16), stage, tile=128)
    # keys are held, and their averages over blocks with what varies inside and with squares, in float32
    keys = (1 + 3 / 3) * 4 * kv_heads * 2048 * 64
    assert beside_the_result(method, 2048, kv_heads, causal) <= BOUND + keys


def test_the_peak_is_that_of_what_lives_together():
    with Peak() as peak:
        x = torch.empty(1000, dtype=torch.uint8, device="meta")
        y = x[10:] + 1
        del x
        y = y * 2
    assert (peak.now, peak.most) == (990, 1990)
    assert len(y) == 990
