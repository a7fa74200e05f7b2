"""Masks: which keys may be attended to, in every form the front door takes them."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math
from front_door import FULL, NARROW, assert_attends, attend, every_align, every_method, padded
from problems import tensors


@every_method
@every_align
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "holes", "all"])
def test_key_masks(method, align, causal, side):
    q, k, v = tensors(24, 30, batch=2, heads=4)
    live = padded(side)
    ours = attend(q, k, v, method, is_causal=causal, causal_align=align, key_mask=live)
    assert_attends(ours, q, k, v, causal=causal, align=align, key_mask=live)
    as_sdpa = attend(q, k, v, method, live[:, None, None], is_causal=causal, causal_align=align)
    for x, y in zip(as_sdpa, ours, strict=True):
        assert_same_bits(x, y)


def test_key_masks_of_both_kinds_combine():
    q, k, v = tensors(30, batch=2)
    one, other = padded("holes"), padded("left")
    both = attend(q, k, v, FULL, other[:, None, None], key_mask=one)
    for x, y in zip(both, attend(q, k, v, FULL, key_mask=one & other), strict=True):
        assert_same_bits(x, y)
    for_all_rows = attend(q, k, v, FULL, one[1:, None, None])
    for x, y in zip(for_all_rows, attend(q, k, v, FULL, key_mask=one[1:].expand(2, -1)), strict=True):
        assert_same_bits(x, y)


def test_sinks_are_the_first_live_keys():
    q, k, v = tensors(80, batch=2)
    live = torch.arange(80)[None] >= torch.tensor([[0], [37]])
    method = ha.Method(ha.Sinks(3), ha.Window(4), tile=16)
    out = ha.attention(q, k, v, is_causal=True, method=method, key_mask=live)
    seen = torch.zeros(2, 80, 80, dtype=torch.bool)
    for row, first in enumerate((0, 37)):
        for i in range(first, 80):
            start = max(first, i // 16 * 16)
            seen[row, i, first : min(first + 3, i + 1)] = True
            seen[row, i, max(first, start - 4) : i + 1] = True
    mask = seen[:, None]
    assert_same_math(out, *(f(q, k, v, attn_mask=mask)[0] for f in (dense.reference, dense.attention)))


@pytest.mark.parametrize("method", [None, ha.Exact()], ids=["default", "exact"])
@pytest.mark.parametrize(
    "shape", [(24, 30), (2, 1, 24, 30), (1, 4, 24, 30), (2, 4, 1, 30), (24, 1), (2, 4, 24, 30)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_dense_masks_broadcast_as_in_sdpa(method, shape, kind):
    q, k, v = tensors(24, 30, batch=2, heads=4)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = mask > -1 if kind == "bool" else mask
    ours = attend(q, k, v, method, mask)
    assert_attends(ours, q, k, v, attn_mask=mask)
    # rows that see nothing are zeros here as in SDPA, or NaN in some of its kernels
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_exact(ours[0], torch.where(torch.isnan(expected), 0.0, expected))
    live = padded("holes")
    assert_attends(attend(q, k, v, method, mask, key_mask=live), q, k, v, attn_mask=mask, key_mask=live)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_dense_masks_keep_the_dtype(dtype):
    q, k, v = tensors(20, dtype=dtype)
    mask = torch.zeros(20, 20, dtype=dtype).masked_fill(~dense.visible(20, 20, causal=True), -torch.inf)
    assert_attends(attend(q, k, v, None, mask), q, k, v, attn_mask=mask)
    assert ha.attention(q, k, v, mask).dtype == dtype
