"""Wrong arguments: each is refused with the offending value, the rule and the remedy, or does what is documented."""

from collections.abc import Iterator
from dataclasses import FrozenInstanceError

import jaxtyping
import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_same_bits, assert_same_math
from cases import CASES, CONTROL
from front_door import with_lse
from hyperattention import select
from hyperattention.problem import Problem
from problems import tensors


@pytest.fixture(autouse=True)
def without_shape_checks() -> Iterator[None]:
    """Run as a user does: the checks of annotations that the other tests run under would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def call(change: dict[str, Tensor] | None = None, **options) -> Tensor:
    q, k, v = tensors(12, batch=2, heads=4, kv_heads=4)
    arguments = {"query": q, "key": k, "value": v} | (change or {})
    if "audit" in options:
        return ha.measured_attention(**arguments, **options).out
    return ha.attention(**arguments, **options)


def zeros(*shape: int, **options) -> Tensor:
    return torch.zeros(shape, **options)


TENSORS = {
    "dtypes": (
        {"key": zeros(2, 4, 12, 8).double()},
        TypeError,
        "torch.float32, torch.float64, torch.float32: convert them to one",
    ),
    "arrays of another library": (
        {x: [[1.0]] for x in ("query", "key", "value")},
        TypeError,
        "query is list: it must be a floating-point tensor",
    ),
    "integers": (
        {x: zeros(2, 4, 12, 8).int() for x in ("query", "key", "value")},
        TypeError,
        "query is torch.int32: it must be a floating-point tensor",
    ),
    "devices": ({"value": zeros(2, 4, 12, 8, device="meta")}, ValueError, "cpu, cpu, meta: move them to one device"),
    "head_dim": ({"key": zeros(2, 4, 12, 6)}, ValueError, "(2, 4, 12, 6).*same head_dim"),
    "heads": ({"key": zeros(2, 3, 12, 8), "value": zeros(2, 3, 12, 8)}, ValueError, "4 query heads cannot share 3 kv heads"),
    "heads without gqa": ({"key": zeros(2, 2, 12, 8), "value": zeros(2, 2, 12, 8)}, ValueError, "pass enable_gqa=True"),
    "heads of values": ({"value": zeros(2, 2, 12, 8)}, ValueError, "key and value must have the same heads and tokens"),
    "tokens of values": ({"value": zeros(2, 4, 11, 8)}, ValueError, "key and value must have the same heads and tokens"),
    "batch": ({"query": zeros(1, 4, 12, 8)}, ValueError, "batch sizes differ; expand the smaller"),
    "axes": ({"query": zeros(4, 12, 8)}, ValueError, "(4, 12, 8).*add the missing axes with unsqueeze"),
    "no heads": ({"query": zeros(2, 0, 12, 8)}, ValueError, "heads and head_dim must be positive"),
    "no head_dim": (
        {"query": zeros(2, 4, 12, 0), "key": zeros(2, 4, 12, 0)},
        ValueError,
        "heads and head_dim must be positive",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("method", [None, CONTROL], ids=["default", "control"])
def test_tensors_that_do_not_fit(change, error, message, method):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        call(change, method=method)


OPTIONS = {
    "dropout": ({"dropout_p": 0.1}, NotImplementedError, "dropout_p=0.1.*not supported; set dropout_p=0.0"),
    "negative seed": ({"seed": -1}, ValueError, r"seed=-1: it must be an integer in \[0, 2\*\*63\)"),
    "large seed": ({"seed": 2**63}, ValueError, r"seed=9223372036854775808: it must be"),
    "fractional seed": ({"seed": 1.5}, ValueError, r"seed=1.5: it must be an integer"),
    "truth as seed": ({"seed": True}, ValueError, r"seed=True: it must be an integer"),
    "alignment": ({"causal_align": "left"}, ValueError, "causal_align='left': it must be 'upper_left'.*or 'lower_right'"),
    "stage for method": ({"method": ha.Window(4)}, TypeError, r"method=Window\(size=4\).*Method\(...\)"),
    "name for method": ({"method": "control"}, TypeError, "method='control'"),
    "no rows to audit": ({"audit": 0}, ValueError, "0 rows to audit: give a positive integer"),
    "mask of integers": ({"key_mask": zeros(2, 12).int()}, TypeError, "key_mask is torch.int32: it must be boolean"),
    "mask too short": (
        {"key_mask": zeros(2, 11).bool()},
        ValueError,
        r"key_mask has shape \(2, 11\).*\[batch, keys\] = \(2, 12\)",
    ),
    "mask of one row": ({"key_mask": zeros(1, 12).bool()}, ValueError, r"\(1, 12\) and must be \[batch, keys\]"),
    "dense mask": (
        {"attn_mask": zeros(12, 11).bool()},
        ValueError,
        r"attn_mask has shape \(12, 11\).*not broadcast to \(2, 4, 12, 12\)",
    ),
    "mask of five axes": ({"attn_mask": zeros(1, 1, 1, 12, 12).bool()}, ValueError, "does not broadcast"),
    "mask of doubles": (
        {"attn_mask": zeros(12, 12).double()},
        TypeError,
        "attn_mask is torch.float64.*of the query's dtype",
    ),
    "dense and causal": (
        {"attn_mask": zeros(12, 12), "is_causal": True},
        ValueError,
        "ambiguous: fold causality into the mask",
    ),
    "dense and lists": (
        {"attn_mask": zeros(12, 12), "method": CONTROL},
        NotImplementedError,
        "cannot follow a dense attn_mask.*Use key_mask",
    ),
    "dense and audit": ({"attn_mask": zeros(12, 12), "audit": 4}, ValueError, "audit=4 cannot follow a dense attn_mask"),
}


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)


def test_a_dense_mask_beyond_the_limit(monkeypatch):
    monkeypatch.setattr("hyperattention.inputs.DENSE_PAIRS", 100)
    with pytest.raises(ValueError, match="12 x 12 pairs is beyond the limit of 100: use key_mask.*varlen_attention"):
        call(attn_mask=zeros(12, 12))
    # a key mask in SDPA's form is no dense mask
    call(attn_mask=torch.ones(2, 1, 1, 12, dtype=torch.bool), method=CONTROL)


@pytest.mark.parametrize("edges", [[0, 5], [1, 12], [0, 13], [0, 8, 6, 12], []])
def test_packed_edges_that_do_not_fit(edges):
    q, k, v = tensors(12)
    with pytest.raises(ValueError, match="cu_seq_q is .*: it must rise from 0 to the number of tokens, 12"):
        ha.varlen_attention(q, k, v, torch.tensor(edges, dtype=torch.int64))


def test_packed_edges_of_another_number():
    q, k, v = tensors(12)
    with pytest.raises(ValueError, match="cu_seq_q names 2 sequences and cu_seq_k 1"):
        ha.varlen_attention(q, k, v, torch.tensor([0, 5, 12]), torch.tensor([0, 12]))


STAGES = {
    "Sinks": ("num", lambda x: ha.Sinks(x)),
    "Window": ("size", lambda x: ha.Window(x)),
    "Draw": ("num", lambda x: ha.Draw(x)),
    "TopBlocks": ("num", lambda x: ha.TopBlocks(x)),
    "TopBlocks by size": ("block_size", lambda x: ha.TopBlocks(2, block_size=x)),
    "TopBlocks by groups": ("pooled", lambda x: ha.TopBlocks(2, pooled=x)),
    "KeySketch": ("dim", lambda x: select.KeySketch(x)),
    "Method": ("tile", lambda x: ha.Method(ha.Window(4), tile=x)),
}


@pytest.mark.parametrize(("name", "make"), STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("bad", [0, -3, 1.5, "4", True], ids=repr)
def test_sizes_of_stages_are_positive_integers(name, make, bad):
    with pytest.raises(ValueError, match=f"{name}={bad!r}.*must be a positive integer"):
        make(bad)


def test_methods_are_made_of_stages():
    with pytest.raises(ValueError, match=r"at least one stage; for exact attention use Exact\(\)"):
        ha.Method()
    for wrong in (4, "window", ha.Window, CONTROL, ha.Uniform()):
        with pytest.raises(TypeError, match="takes stages such as"):
            ha.Method(ha.Sinks(4), wrong)
    for part, name in ((CONTROL, "tile"), (select.Mix((ha.Uniform(), 1.0)), "parts"), (ha.Window(4), "size")):
        with pytest.raises(FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(part, name, 3)


ORDERS = {
    "two windows": (ha.Window(8), ha.Window(16)),
    "window after draws": (ha.Draw(8), ha.Window(16)),
    "sinks after draws": (ha.Draw(8), ha.Sinks(4)),
    "draws twice": (ha.Draw(8), ha.Draw(8)),
    "blocks after draws": (ha.Draw(8), ha.TopBlocks(2, block_size=8)),
    "window after blocks": (ha.TopBlocks(2, block_size=8), ha.Window(16)),
    "sinks after blocks": (ha.TopBlocks(2, block_size=8), ha.Sinks(4)),
}


@pytest.mark.parametrize("stages", ORDERS.values(), ids=ORDERS)
def test_orders_in_which_keys_would_count_twice(stages):
    with pytest.raises(ValueError, match="twice"):
        ha.Method(*stages)


@pytest.mark.parametrize(
    "stage", [ha.Window(1000), ha.Draw(1000), ha.TopBlocks(1000, block_size=8), ha.Sinks(1000)], ids=repr
)
@pytest.mark.parametrize("causal", [True, False])
def test_a_budget_larger_than_the_keys_is_exact(stage, causal):
    from dense import attention, reference

    q, k, v = tensors(40)
    out = ha.attention(q, k, v, is_causal=causal, method=ha.Method(stage, tile=16))
    assert_same_math(out, *(f(q, k, v, causal=causal)[0] for f in (reference, attention)))


# values that are not finite


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_check_finite_refuses_them(name, poison):
    bad = tensors(12, batch=2, heads=4, kv_heads=4)[0]
    bad[1, 2, 3, :2] = poison
    with pytest.raises(ValueError, match=f"{name} holds 2 values that are NaN or infinite; check_finite=True refuses them"):
        call({name: bad}, check_finite=True)
    call({name: bad})
    call(check_finite=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_they_never_break_a_selection_nor_leave_their_head(case):
    clean = tensors(case.num_tokens, heads=4)
    for poison in (torch.nan, torch.inf):
        for where in range(3):
            bad = [x.clone() for x in clean]
            bad[where][:, -1, case.num_tokens // 3] = poison
            for causal in (True, False):
                before, after = (
                    ha.attention(*x, is_causal=causal, enable_gqa=True, method=case.method) for x in (clean, bad)
                )
                assert_same_bits(after[:, :2], before[:, :2])


@pytest.mark.parametrize("name", ["exact", "control"])
def test_a_row_that_lists_nan_is_nan(name):
    method = {"exact": ha.Exact(), "control": CONTROL}[name]
    q, k, v = tensors(100)
    k[:, :, 40] = torch.nan
    out, lse = with_lse(q, k, v, is_causal=True, method=method)
    # every row near it does
    assert torch.isnan(out[:, :, 40:48]).all()
    assert torch.isnan(lse[:, :, 40:48]).all()


def test_a_nan_key_reaches_exactly_the_rows_that_list_it():
    q, k, v = tensors(100)
    scale, at = q.shape[-1] ** -0.5, 40
    listed = dense.weights(CONTROL, Problem(q, k, v, scale, causal=True))[..., at] > 0
    seen = torch.arange(100) >= at
    # draws leave this key out of some rows that may see it
    assert listed.any()
    assert (seen & ~listed).any()
    for name, where in (("key", 1), ("value", 2)):
        bad = [q, k.clone(), v.clone()]
        bad[where][:, :, at] = torch.nan
        reached = torch.isnan(ha.attention(*bad, is_causal=True, method=CONTROL)).any(-1)
        exactly = torch.isnan(ha.attention(*bad, is_causal=True, method=ha.Exact())).any(-1)
        if name == "key":
            assert_same_bits(reached, listed)
            assert_same_bits(exactly, seen.expand_as(listed))
        else:  # earlier rows of the tile that the key lies in as well, and no others
            tile = (torch.arange(100) >= at // 16 * 16) & ~seen
            assert_same_bits(reached, listed | tile)
            assert exactly[:, :, seen].all()
        with pytest.raises(ValueError, match=f"{name} holds"):
            ha.attention(*bad, is_causal=True, method=CONTROL, check_finite=True)
