"""Exact attention: against torch in float64, at every odd shape, with and without chunks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hyperattention.exact as exact_module
from assertions import assert_exact, assert_same_bits, assert_same_math
from hyperattention.exact import exact_attention, visible_keys

SCALE = 0.3
# (heads, kv heads, queries, keys, head_dim, value_dim, is_causal, causal_align)
SHAPES = [
    (1, 1, 1, 1, 4, 4, True, "upper_left"),
    (2, 2, 63, 63, 8, 8, True, "upper_left"),
    (4, 2, 37, 37, 8, 5, False, "upper_left"),
    (6, 1, 29, 37, 8, 3, True, "lower_right"),
    (4, 2, 37, 29, 8, 5, True, "lower_right"),
    (4, 4, 37, 29, 8, 5, True, "upper_left"),
]


def make(heads, kv_heads, queries, keys, head_dim=8, value_dim=8, *, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(heads, queries, head_dim), (kv_heads, keys, head_dim), (kv_heads, keys, value_dim)]
    return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(q, k, v, allowed=None, bias=None):
    """Plain softmax attention, the whole matrix at once; rows that see nothing give 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * SCALE
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def causal(queries, keys, align):
    shift = keys - queries if align == "lower_right" else 0
    return torch.arange(keys) <= torch.arange(queries)[:, None] + shift


@pytest.fixture(params=[None, 24])
def chunked(request, monkeypatch):
    """Run whole, and cut into chunks of a row or a few and of one kv head."""
    if request.param:
        monkeypatch.setattr(exact_module, "_CHUNK_SCORES", request.param)
        monkeypatch.setattr(exact_module, "_MIN_ROWS", 1)
        monkeypatch.setattr(exact_module, "_SPAN", 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("chunked")
def test_equals_dense_attention(shape):
    *sizes, is_causal, align = shape
    q, k, v = make(*sizes)
    queries, keys = q.shape[2], k.shape[2]
    partial = exact_attention(q, k, v, scale=SCALE, visible=visible_keys(queries, keys, is_causal, align, "cpu"))
    out, lse = dense(q, k, v, causal(queries, keys, align) if is_causal else None)
    assert_exact(partial.out, out)
    assert_exact(partial.lse, lse)


@pytest.mark.usefixtures("chunked")
def test_gradients_with_lse():
    q, k, v = (x.requires_grad_() for x in make(2, 1, 4, 3, 2, 2, batch=1))
    visible = visible_keys(4, 3, True, "lower_right", "cpu")
    live = visible[0] > 0

    def run(q, k, v):
        partial = exact_attention(q, k, v, scale=SCALE, visible=visible)
        return partial.out, partial.lse[:, :, live]

    assert not live.all()
    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.usefixtures("chunked")
def test_a_row_that_sees_nothing_is_zero_with_zero_gradient():
    q, k, v = (x.requires_grad_() for x in make(2, 1, 9, 6))
    key_mask = torch.ones(2, 6, dtype=torch.bool)
    key_mask[0, :4] = False
    key_mask[1] = False
    partial = exact_attention(q, k, v, scale=SCALE, visible=visible_keys(9, 6, True, "upper_left", "cpu"), key_mask=key_mask)
    empty = torch.zeros(2, 2, 9, dtype=torch.bool)
    empty[0, :, :4] = True
    empty[1] = True
    assert torch.equal(partial.lse == -torch.inf, empty)
    assert (partial.out[empty] == 0).all()
    (partial.out.sum() + partial.lse.masked_fill(empty, 0.0).sum()).backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert (q.grad[empty] == 0).all()
    assert (q.grad[~empty] != 0).any()
    assert (v.grad[1] == 0).all()


@pytest.mark.usefixtures("chunked")
def test_a_row_hidden_by_an_additive_mask_has_zero_gradient():
    q, k, v = (x.requires_grad_() for x in make(2, 1, 5, 4))
    mask = torch.zeros(5, 4, dtype=torch.float64)
    mask[2] = -torch.inf
    partial = exact_attention(q, k, v, scale=SCALE, attn_mask=mask)
    assert (partial.lse[:, :, 2] == -torch.inf).all()
    (partial.out.sum() + partial.lse.masked_fill(partial.lse == -torch.inf, 0.0).sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[:, :, 2] == 0).all()


@pytest.mark.parametrize("shape", [(11,), (9, 1), (9, 11), (4, 1, 11), (2, 1, 1, 11), (2, 4, 9, 11), (1, 4, 1, 1)])
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.usefixtures("chunked")
def test_attn_mask_broadcasts_as_in_sdpa(shape, boolean):
    q, k, v = make(4, 2, 9, 11)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = mask > -0.5 if boolean else mask
    key_mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(2)) > 0.3
    allowed = key_mask[:, None, None]
    out, lse = dense(q, k, v, allowed & mask if boolean else allowed, None if boolean else mask)
    partial = exact_attention(q, k, v, scale=SCALE, attn_mask=mask, key_mask=key_mask)
    assert_exact(partial.out, out)
    assert_exact(partial.lse, lse)


def test_visible_may_differ_between_batch_entries():
    q, k, v = make(2, 2, 5, 8)
    visible = torch.tensor([[1, 3, 0, 8, 2], [8, 0, 0, 1, 5]])
    partial = exact_attention(q, k, v, scale=SCALE, visible=visible)
    out, lse = dense(q, k, v, (torch.arange(8) < visible[..., None])[:, None])
    assert_exact(partial.out, out)
    assert_exact(partial.lse, lse)


@pytest.mark.usefixtures("chunked")
def test_some_rows_are_the_rows_of_all():
    q, k, v = make(4, 2, 12, 12)
    visible = visible_keys(12, 12, True, "upper_left", "cpu")
    bias = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([3, 0, 11, 3])
    every = exact_attention(q, k, v, scale=SCALE, visible=visible, attn_mask=bias)
    some = exact_attention(q, k, v, scale=SCALE, visible=visible, attn_mask=bias, row_index=index)
    assert_exact(some.out, every.out[:, :, index])
    assert_exact(some.lse, every.lse[:, :, index])


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(queries, keys):
    q, k, v = (x.requires_grad_() for x in make(2, 1, queries, keys, 4, 3))
    partial = exact_attention(q, k, v, scale=SCALE, visible=visible_keys(queries, keys, True, "lower_right", "cpu"))
    assert partial.out.shape == (2, 2, queries, 3)
    assert (partial.out == 0).all()
    assert (partial.lse == -torch.inf).all()
    partial.out.sum().backward()
    assert (q.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_most_twice_the_error_of_plain_torch(dtype):
    q, k, v = make(2, 2, 64, 200, 16, 16, dtype=dtype)
    reference = dense(*(x.double() for x in (q, k, v)))[0]
    partial = exact_attention(q, k, v, scale=SCALE)
    assert partial.out.dtype == partial.lse.dtype == torch.float32
    assert_same_math(partial.out.to(dtype), reference, dense(q, k, v)[0])


def test_autocast_does_not_round_the_oracle():
    q, k, v = make(2, 1, 20, 30, dtype=torch.float32)
    plain = exact_attention(q, k, v, scale=SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = exact_attention(q, k, v, scale=SCALE)
    assert_same_bits(inside.out, plain.out)


class LargestTensor(TorchDispatchMode):
    """Remember the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_no_tensor_of_queries_by_keys_even_in_backward(monkeypatch):
    n = 256
    q, k, v = (x.requires_grad_() for x in make(1, 1, n, n, 4, 4, batch=1))
    visible = visible_keys(n, n, True, "upper_left", "cpu")

    def largest(limit):
        monkeypatch.setattr(exact_module, "_CHUNK_SCORES", limit)
        with LargestTensor() as seen:
            partial = exact_attention(q, k, v, scale=SCALE, visible=visible)
            (partial.out.sum() + partial.lse.sum()).backward()
        return seen.numel

    assert largest(16 * n) <= 16 * n
    assert largest(n * n) >= n * n  # the twin: what the first line would see if chunks were not cut


def test_what_is_saved_for_backward_grows_with_the_keys_only(monkeypatch):
    monkeypatch.setattr(exact_module, "_CHUNK_SCORES", 4 * 256)
    q, k, v = (x.requires_grad_() for x in make(1, 1, 256, 256, 4, 4, batch=1))
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        exact_attention(q, k, v, scale=SCALE)
    assert sum(saved.values()) < 256 * 256 / 2


def test_nan_and_infinity_stay_in_the_rows_that_list_them():
    q, k, v = make(1, 1, 6, 6, batch=1)
    k[..., 3, :] = torch.nan
    partial = exact_attention(q, k, v, scale=SCALE, visible=visible_keys(6, 6, True, "upper_left", "cpu"))
    assert partial.out[0, 0, :3].isfinite().all()
    assert partial.out[0, 0, 3:].isnan().all()
    assert partial.lse[0, 0, 3:].isnan().all()


def test_non_contiguous_inputs():
    q, k, v = make(4, 2, 9, 7)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not turned[0].is_contiguous()
    assert_exact(exact_attention(*turned, scale=SCALE).out, exact_attention(q, k, v, scale=SCALE).out)


def test_meta_tensors_give_shapes():
    q, k, v = (x.to("meta") for x in make(4, 2, 9, 7, 8, 5))
    partial = exact_attention(q, k, v, scale=SCALE, visible=visible_keys(9, 7, True, "upper_left", "meta"))
    assert partial.out.shape == (2, 4, 9, 5)
    assert partial.lse.shape == (2, 4, 9)


def test_bad_input_says_what_to_do():
    q, k, v = make(4, 2, 9, 7)
    with pytest.raises(ValueError, match="3 query heads over 2 kv heads"):
        exact_attention(q[:, :3], k, v, scale=SCALE)
    with pytest.raises(ValueError, match=r"attn_mask has shape \(9, 6\)"):
        exact_attention(q, k, v, scale=SCALE, attn_mask=torch.zeros(9, 6))
    with pytest.raises(ValueError, match="must be 'upper_left' or 'lower_right'"):
        visible_keys(3, 3, True, "upper", "cpu")
