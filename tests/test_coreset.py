"""Attention over weighted keys, against the formula written out in float64."""

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_math
from hyperattention.coreset import Coreset, join, of_heads
from hyperattention.kernels import coreset as coreset_torch
from hyperattention.kernels.list import reference as list_torch
from hyperattention.merge import merge


def inputs(batch: int, heads: int, kv_heads: int, queries: int, slots: int, seed: int = 0) -> tuple[Tensor, Coreset]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # the front of a longer buffer, as caches hand it out
    k, v, weight = (
        normal(batch, kv_heads, slots + 9, 16),
        normal(batch, kv_heads, slots + 9, 8),
        normal(batch, kv_heads, slots + 9),
    )
    weight[..., 3] = -torch.inf
    return normal(batch, heads, queries, 16), Coreset(k[:, :, :slots], v[:, :, :slots], weight[:, :, :slots])


def dense(q: Tensor, coreset: Coreset, own: int, dtype: torch.dtype) -> Tensor:
    group = q.shape[1] // coreset.k.shape[1]
    k, v, weight = (x.to(dtype).repeat_interleave(group, 1) for x in (coreset.k, coreset.v, coreset.log_weight))
    scores = q.to(dtype) @ k.transpose(2, 3) * 16**-0.5 + weight[:, :, None]
    if own:
        limit = torch.arange(q.shape[2]) + coreset.num_slots - own + 1
        scores = scores.masked_fill(torch.arange(coreset.num_slots) >= limit[:, None], -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("own", [False, True], ids=["all slots", "causal"])
@pytest.mark.parametrize("queries", [1, 7, 150])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 2, 2), (2, 6, 2), (3, 4, 1)])
def test_attention_follows_the_weights(batch: int, heads: int, kv_heads: int, queries: int, own: bool) -> None:
    q, coreset = inputs(batch, heads, kv_heads, queries, 200)
    ours = coreset.attend(q, own=queries if own else 0).out
    truth, plain = (dense(q, coreset, queries if own else 0, dtype) for dtype in (torch.float64, torch.float32))
    assert_same_math(ours, truth, plain)


@pytest.mark.parametrize("own", [0, 70])
def test_with_and_without_lists_the_same_is_computed(own: int) -> None:
    q, coreset = inputs(2, 4, 2, 70, 150)
    in_place, by_lists = coreset.attend(q, own=own), coreset.attend(q.clone().requires_grad_(), own=own)
    assert by_lists.out.requires_grad
    assert_exact(in_place.out, by_lists.out.detach())
    assert_exact(in_place.lse, by_lists.lse.detach())


def test_a_decoding_step_gathers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, coreset = inputs(2, 4, 2, 1, 50)
    calls = []
    monkeypatch.setattr(list_torch, "gather", lambda *arguments: calls.append(arguments))
    coreset.attend(q)
    assert not calls
    with pytest.raises(TypeError):
        coreset.attend(q.clone().requires_grad_())
    assert calls


def test_queries_beyond_one_block_are_attended_to_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    q, coreset = inputs(2, 4, 2, 70, 150)
    whole = coreset.attend(q, own=70)
    monkeypatch.setattr(coreset_torch, "_SCORE_BYTES", 4 * 4 * 2 * 150 * 32)
    blocks = coreset.attend(q, own=70)
    assert_exact(blocks.out, whole.out)
    assert_exact(blocks.lse, whole.lse)


@pytest.mark.parametrize("slots", [0, 5])
def test_a_head_without_keys_gives_nothing(slots: int) -> None:
    empty = Coreset(torch.zeros(1, 2, slots, 4), torch.zeros(1, 2, slots, 4), torch.full((1, 2, slots), -torch.inf))
    for q in (torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4, requires_grad=True)):
        part = empty.attend(q)
        assert not part.out.any()
        assert (part.lse == -torch.inf).all()


def test_joined_coresets_are_merged_attention() -> None:
    q, one = inputs(2, 4, 2, 5, 30)
    _, other = inputs(2, 4, 2, 5, 12, seed=1)
    whole, merged = join([one, other]).attend(q), merge([one.attend(q), other.attend(q)])
    assert_exact(whole.out, merged.out)
    assert_exact(whole.lse, merged.lse)


def test_a_key_listed_twice_is_a_key_of_twice_the_weight() -> None:
    q, coreset = inputs(1, 2, 2, 3, 20)
    twice = join([coreset, Coreset(*(x[:, :, 7:8] for x in (coreset.k, coreset.v, coreset.log_weight)))]).attend(q)
    weight = coreset.log_weight.clone()
    weight[..., 7] += torch.log(torch.tensor(2.0))
    heavier = Coreset(coreset.k, coreset.v, weight).attend(q)
    assert_exact(twice.out, heavier.out)
    assert_exact(twice.lse, heavier.lse)


def test_heads_may_hold_different_numbers_of_keys() -> None:
    q, coreset = inputs(1, 4, 2, 3, 40)
    sizes = (40, 11)
    parts = [(coreset.k[0, h, :n], coreset.v[0, h, :n], coreset.log_weight[0, h, :n]) for h, n in enumerate(sizes)]
    ours = of_heads(parts).attend(q).out
    for h, (k, v, weight) in enumerate(parts):
        alone = Coreset(k[None, None], v[None, None], weight[None, None]).attend(q[:, 2 * h : 2 * h + 2]).out
        assert_exact(ours[:, 2 * h : 2 * h + 2], alone)


def test_what_was_not_dropped_is_exact() -> None:
    q, coreset = inputs(2, 4, 2, 9, 64)
    whole = Coreset.of(coreset.k, coreset.v)
    plain = torch.nn.functional.scaled_dot_product_attention(q, whole.k, whole.v, enable_gqa=True)
    assert_exact(whole.attend(q).out, plain)
    assert whole.memory_bytes == 2 * 2 * 64 * (16 + 8 + 1) * 4


def test_what_does_not_fit_is_refused() -> None:
    q, coreset = inputs(1, 4, 2, 3, 20)
    with pytest.raises(ValueError, match="multiple of the kv heads"):
        coreset.attend(q[:, :3])
    with pytest.raises(ValueError, match="own=2 with 3 queries"):
        coreset.attend(q, own=2)
    with pytest.raises(ValueError, match="log-weights have no gradient"):
        Coreset(coreset.k, coreset.v, coreset.log_weight.clone().requires_grad_()).attend(q)
    with pytest.raises(ValueError, match="cannot be joined"):
        join([coreset, Coreset(*(x[:, :1] for x in (coreset.k, coreset.v, coreset.log_weight)))])
    with pytest.raises(ValueError, match="give at least one head"):
        of_heads([(coreset.k[0, 0], coreset.v[0, 0, 1:], coreset.log_weight[0, 0])])


def test_shapes_that_do_not_fit_are_refused_where_nothing_checks_annotations(run_python) -> None:
    code = """
import torch
from hyperattention.coreset import Coreset
try:
    Coreset(torch.zeros(1, 2, 20, 16), torch.zeros(1, 2, 19, 8), torch.zeros(1, 2, 20))
except ValueError as error:
    print(error)
"""
    assert "values (1, 2, 19, 8)" in run_python(code)
