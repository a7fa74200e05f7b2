"""How the tests of the front door call it: methods with room for every key, masks, and dense attention to compare with."""

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_same_math

# lists with room for every key: all that a method adds to exact attention is then machinery
FULL = ha.Method(ha.Sinks(4), ha.Window(8), ha.TopBlocks(2, block_size=8), ha.Draw(64), tile=16)
METHODS = {"default": None, "exact": ha.Exact(), "lists": FULL}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_align = pytest.mark.parametrize("align", ["upper_left", "lower_right"])
NARROW = [torch.bfloat16, torch.float16]


def attend(
    q: Tensor, k: Tensor, v: Tensor, method: ha.Method | None, mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    return with_lse(q, k, v, mask, enable_gqa=True, method=method, **options)


def assert_attends(ours: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Out in the dtype of the query and lse in the accumulation dtype are those of dense attention."""
    truth, plain = dense.reference(q, k, v, **options), dense.attention(q, k, v, **options)
    assert_same_math(ours[0], truth[0], plain[0])
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask = options.pop("attn_mask", None)
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    assert_same_math(ours[1], truth[1], dense.attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, **options)[1])


def padded(side: str) -> Tensor:
    """Key masks of two rows of 30 keys, one of them padded."""
    place, live = torch.arange(30), torch.ones(2, 30, dtype=torch.bool)
    live[1] = {"left": place >= 11, "right": place < 19, "holes": place % 3 > 0, "all": place < 0}[side]
    return live


def with_lse(*tensors: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a measured call."""
    result = ha.measured_attention(*tensors, **options)
    return result.out, result.lse


def with_error(*tensors: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """Output and standard error."""
    result = ha.measured_attention(*tensors, standard_error=True, **options)
    assert result.standard_error is not None
    return result.out, result.standard_error


def with_audit(*tensors: Tensor | None, **options) -> tuple[Tensor, ha.ErrorReport]:
    """Output and the audit's report."""
    result = ha.measured_attention(*tensors, **options)
    assert result.audit is not None
    return result.out, result.audit


def within(*tensors: Tensor | None, **options) -> tuple[Tensor, ha.ToleranceReport]:
    """Output and the report of a tolerance."""
    result = ha.measured_attention(*tensors, **options)
    assert result.tolerance is not None
    return result.out, result.tolerance
