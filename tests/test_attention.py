"""The front door: SDPA's arguments and semantics, whatever method runs behind it."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_same_math
from cases import CONTROL
from front_door import FULL, NARROW, assert_attends, attend, every_align, every_method, padded, with_audit, with_lse
from hyperattention import select
from problems import tensors

# shapes and dtypes


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_dtypes(method, dtype, causal):
    q, k, v = tensors(30, dtype=dtype)
    ours = attend(q, k, v, method, is_causal=causal)
    assert_attends(ours, q, k, v, causal=causal)
    alone = ha.attention(q, k, v, is_causal=causal, method=method)
    assert alone.dtype == dtype
    assert_same_math(alone, *(f(q, k, v, causal=causal)[0] for f in (dense.reference, dense.attention)))


@every_method
@every_align
@pytest.mark.parametrize(("num_queries", "num_keys"), [(30, 30), (13, 30), (30, 13), (1, 30), (17, 16)])
def test_lengths_alignments_and_shared_heads(method, align, num_queries, num_keys):
    q, k, v = tensors(num_queries, num_keys, batch=2, heads=6, value_dim=5)
    options = {"causal": True, "align": align}
    assert_attends(attend(q, k, v, method, is_causal=True, causal_align=align), q, k, v, **options)
    if align == "upper_left":
        expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert_same_math(
            ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=method),
            dense.reference(q, k, v, **options)[0],
            expected,
        )
    assert_attends(attend(q, k, v, method), q, k, v)


@every_method
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_heads_share_kv_heads_in_order(method, kv_heads):
    q, k, v = tensors(30, heads=4, kv_heads=kv_heads)
    ours = ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=method)
    repeated = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    assert_exact(ours, ha.attention(q, *repeated, is_causal=True, method=method))


@every_method
def test_any_strides(method):
    q, k, v = tensors(30, batch=2)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)] + [v.repeat_interleave(2, 3)[..., ::2]]
    for options in ({}, {"key_mask": padded("left")}):
        ours, expected = (attend(*x, method, is_causal=True, **options) for x in (apart, (q, k, v)))
        for x, y in zip(ours, expected, strict=True):
            assert_exact(x, y)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    assert_exact(attend(*shared, method)[0], attend(*(x.contiguous() for x in shared), method)[0])


@every_method
def test_scale(method):
    q, k, v = tensors(30)
    assert_attends(attend(q, k, v, method, is_causal=True, scale=0.21), q, k, v, causal=True, scale=0.21)
    assert_exact(attend(q, k, v, method, scale=0.0)[0], v.mean(2, keepdim=True).expand_as(v))


# packed sequences


@every_method
@every_align
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_do_not_see_one_another(method, align, causal):
    lengths_q, lengths_k = [9, 0, 20, 1, 5], [9, 3, 30, 1, 0]
    q, k, v = tensors(sum(lengths_q), sum(lengths_k), heads=4)
    edges_q, edges_k = (torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()]) for x in (lengths_q, lengths_k))
    options = {"is_causal": causal, "causal_align": align, "enable_gqa": True, "method": method, "seed": 5}
    result = ha.measured_varlen_attention(q, k, v, edges_q, edges_k, **options)
    ours = result.out, result.lse
    assert_exact(ha.varlen_attention(q, k, v, edges_q.int(), edges_k.int(), **options), ours[0])
    for q0, q1, k0, k1 in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False):
        piece = q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]
        for x, y in zip(ours, with_lse(*piece, **options), strict=True):
            assert_exact(x[:, :, q0:q1], y)
        assert_attends(tuple(x[:, :, q0:q1] for x in ours), *piece, causal=causal, align=align)


def test_packed_sequences_share_their_edges_unless_told():
    q, k, v = tensors(30)
    edges = torch.tensor([0, 11, 30])
    one = ha.varlen_attention(q, k, v, edges, is_causal=True, method=FULL)
    assert_same_bits(one, ha.varlen_attention(q, k, v, edges, edges, is_causal=True, method=FULL))
    empty = tuple(x[:, :, :0] for x in (q, k, v))
    for edges in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        assert ha.varlen_attention(*empty, edges, method=FULL).shape == empty[0].shape


# what comes back


@every_method
def test_return_forms(method):
    q, k, v = tensors(30)
    out = ha.attention(q, k, v, is_causal=True, method=method)
    assert isinstance(out, Tensor)
    first, lse = with_lse(q, k, v, is_causal=True, method=method)
    assert lse.dtype == torch.float32
    second, report = with_audit(q, k, v, is_causal=True, method=method, audit=8)
    result = ha.measured_attention(q, k, v, is_causal=True, method=method, audit=8)
    third, lse_again, report_again = result.out, result.lse, result.audit
    for x in (first, second, third):
        assert_exact(x, out)
    assert_same_bits(lse_again, lse)
    assert isinstance(report, ha.ErrorReport)
    assert report.relative_error.shape == (1, 2)
    assert_exact(report.relative_error + 1, torch.ones(1, 2, dtype=report.relative_error.dtype))
    assert isinstance(report_again, ha.ErrorReport)


def test_audit_sees_the_masks_and_the_alignment():
    q, k, v = tensors(24, 30, batch=2, heads=4)
    live = padded("left")
    for options in ({"key_mask": live}, {"attn_mask": live[:, None, None]}, {"causal_align": "lower_right"}, {"scale": 0.3}):
        options = {"is_causal": True, "enable_gqa": True, "method": FULL} | options
        mask = options.pop("attn_mask", None)
        _, report = with_audit(q, k, v, mask, audit=12, **options)
        assert (report.relative_error < 1e-5).all()
    _, report = with_audit(q, k, v, enable_gqa=True, method=ha.Method(ha.Window(2), tile=2), audit=12)
    assert (report.relative_error > 0.05).all()


def test_no_method_is_exact_below_the_crossover_and_visible():
    q, k, v = tensors(40)
    assert ha.default_method(40) == ha.Exact()
    assert_same_bits(ha.attention(q, k, v, is_causal=True), ha.attention(q, k, v, is_causal=True, method=ha.Exact()))
    small = ha.attention(q, k, v, is_causal=True, method=CONTROL)
    assert not torch.equal(small, ha.attention(q, k, v, is_causal=True)), "an explicit method runs as written, however short"
    long, few = ha.default_method(10**6), ha.default_method(10**6, num_queries=1)
    assert isinstance(long, ha.Method)
    assert few == ha.Exact()
    assert eval(repr(long), vars(ha) | vars(select)) == long
    # exact attention is faster up to longer lengths on a GPU
    assert ha.default_method(32_768, device="cuda") == ha.Exact() != ha.default_method(32_768, device="cpu")
    assert isinstance(ha.default_method(10**6, device="cuda:0"), ha.Method)


def test_above_the_crossover_no_method_runs_the_default():
    from hyperattention.methods.default import CROSSOVER

    q, k, v = tensors(CROSSOVER, heads=1, kv_heads=1, head_dim=4, value_dim=4)
    with torch.no_grad():
        ours = ha.attention(q, k, v, is_causal=True, seed=3)
        assert_same_bits(ours, ha.attention(q, k, v, is_causal=True, seed=3, method=ha.default_method(CROSSOVER)))
