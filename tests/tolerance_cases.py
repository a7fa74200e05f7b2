"""Calls with a tolerance, as their tests make them: heads that draws serve well or not at all, and a small ladder."""

import hyperattention as ha
from hyperattention.error.tolerance.ladder import Ladder
from hyperattention.methods.method import Method
from problems import tensors

NUM = 1024
LADDER = Ladder(tuple(Method(ha.Sinks(4), ha.Window(16), ha.Draw(num), tile=16) for num in (16, 32, 64, 128, 256)))
# heads of a group share a fate: two query heads each
SHAPE = {"heads": 4, "kv_heads": 2}
OPTIONS = {"is_causal": True, "enable_gqa": True, "method": LADDER}


def inputs(seed=0, num=NUM, **shape):
    """A head that draws serve well, and one that looks for single far keys, which draws miss."""
    q, k, v = tensors(num, seed=seed, **(SHAPE | shape))
    q[:, :2] *= 0.4
    v[:, :1] += 1.0
    q[:, 2:] = 12 * k[:, 1:].roll(num // 2, 2)[:, :, -q.shape[2] :]
    return q, k, v


def easy(seed=0, num=NUM, **shape):
    q, k, v = tensors(num, seed=seed, **(SHAPE | shape))
    return 0.4 * q, k, v + 0.5


def errors(out, q, k, v, **options):
    exact = ha.attention(q, k, v, enable_gqa=True, method=ha.Exact(), **options)
    norm = exact.norm(dim=-1)
    error = ((out - exact).norm(dim=-1) / norm).masked_fill(norm == 0, 0.0)
    return error.sum(-1) / (norm > 0).sum(-1)
