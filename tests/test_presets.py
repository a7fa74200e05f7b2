"""HyperAttention as published, without its slips."""

import pytest
import torch
from torch import Tensor

import dense
import hyperattention as ha
from assertions import assert_exact, assert_same_bits, assert_unbiased
from front_door import with_lse
from hyperattention.methods.presets import HyperAttention
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.score.value_norm import ValueNorm
from hyperattention.select.stage import LookAhead
from pair_weights import pair_weights, replicas
from test_hash_buckets import Forgetful

SMALL = HyperAttention(block_size=6, sample_size=6, min_seq_len=8)
DOORS = {
    "full": {},
    "causal": {"is_causal": True},
    "lower right": {"is_causal": True, "causal_align": "lower_right"},
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(queries: int, keys: int, options: dict) -> Tensor:
    return dense.visible(queries, keys, causal="is_causal" in options, align=options.get("causal_align", "upper_left"))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (23, 40), (40, 23)])
def test_exact_at_or_below_the_least_length(queries: int, keys: int, door: str) -> None:
    q, k, v = tokens(2, 4, queries, 4), tokens(2, 2, keys, 4, seed=1), tokens(2, 2, keys, 3, seed=2)
    options = DOORS[door] | {"enable_gqa": True, "key_mask": torch.arange(keys)[None].repeat(2, 1) > 2}
    expected = with_lse(q, k, v, method=ha.Exact(), **options)
    for method in (HyperAttention(), HyperAttention(min_seq_len=41), HyperAttention(keys, keys, min_seq_len=3)):
        for ours, theirs in zip(with_lse(q, k, v, method=method, **options), expected, strict=True):
            assert_exact(ours, theirs)
    assert not torch.equal(ha.attention(q, k, v, method=SMALL, **options), expected[0])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (21, 40), (40, 27)])
def test_partition_of_unity(queries: int, keys: int, door: str) -> None:
    q, k = replicas(tokens(1, 2, queries, 4), tokens(1, 1, keys, 4, seed=1), 400)
    live = torch.arange(keys)[None] != 5
    sizes = torch.linspace(-0.5, 0.5, keys, dtype=torch.float64).exp()
    weight = pair_weights(SMALL, q, k, sizes, key_mask=live, **DOORS[door])
    seen = (truth(queries, keys, DOORS[door]) & live).double()
    assert_exact(weight * (1 - seen), torch.zeros_like(weight))
    for head in range(2):
        assert_unbiased(weight[0, head::2], seen, largest_error=0.4, rounding=1e-6)


def test_a_sampled_key_in_the_own_bucket_does_not_count_twice() -> None:
    q, k = replicas(*[tokens(1, 1, 33, 4)] * 2, 300)
    ones = torch.ones(33, 33, dtype=torch.float64)
    assert_unbiased(pair_weights(SMALL, q, k)[0], ones, largest_error=0.4, rounding=1e-6)
    published = ha.Method(Forgetful(HashBuckets(6)), ha.Draw(6, by=ValueNorm(power=2)), tile=33)
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        assert_unbiased(pair_weights(published, q, k)[0], ones, largest_error=0.4, rounding=1e-6)


def test_blocks_of_the_recursion_draw_apart() -> None:
    x = tokens(1, 1, 8, 4).repeat(1, 1, 4, 1)
    # one key to a bucket, so that a row's list is its sample but for one key; leaves of 8, blocks of 16 x 16 and of 8 x 8
    weight = pair_weights(HyperAttention(1, 2, min_seq_len=8), x, x, is_causal=True)[0, 0].round()
    # blocks of 8 x 8 over the same tokens: only the draws can differ
    assert not torch.equal(weight[8:16, :8], weight[24:, 16:24])


@pytest.mark.parametrize("door", ["full", "causal"])
def test_gradient_is_that_of_the_selection_held_fixed(door: str) -> None:
    q, k = (tokens(1, h, 23, 4, seed=h).requires_grad_() for h in (4, 2))
    v = torch.diag(torch.linspace(1, 3, 23, dtype=torch.float64)).expand(1, 2, -1, -1).clone().requires_grad_()
    weight = pair_weights(SMALL, q.detach(), k.detach(), v.detach()[0, 0].diagonal(), **DOORS[door])
    weight = torch.where(weight < 1e-9, 0.0, weight)
    ours = with_lse(q, k, v, method=SMALL, enable_gqa=True, **DOORS[door])
    theirs = dense.attention(q, k, v, causal=door == "causal", weight=weight)
    mix = tokens(1, 4, 23, 23, seed=9)
    grads = [torch.autograd.grad((out * mix).sum() + lse.sin().sum(), (q, k, v)) for out, lse in (ours, theirs)]
    for mine, expected in zip(*grads, strict=True):
        assert torch.isfinite(mine).all()
        assert_exact(mine, expected)


def test_rows_that_see_nothing() -> None:
    q, k = tokens(1, 1, 30, 4).requires_grad_(), tokens(1, 1, 12, 4, seed=1).requires_grad_()
    out, lse = with_lse(q, k, k, method=SMALL, is_causal=True, causal_align="lower_right")
    assert_same_bits(out[:, :, :18], torch.zeros(1, 1, 18, 4, dtype=torch.float64))
    assert bool((lse[:, :, :18] == -torch.inf).all())
    out.sum().backward()
    assert q.grad is not None
    assert_same_bits(q.grad[:, :, :18], torch.zeros(1, 1, 18, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [0, 1, 40])
def test_shapes_and_dtypes(queries: int, dtype: torch.dtype) -> None:
    q, k = tokens(1, 1, queries, 4).to(dtype), tokens(1, 1, 30, 4).to(dtype)
    for door in DOORS.values():
        out, lse = with_lse(q, k, k[..., :3], method=SMALL, **door)
        assert (out.shape, out.dtype, lse.dtype) == ((1, 1, queries, 3), dtype, torch.float32)
        assert ha.attention(q, k[:, :, :0], k[:, :, :0], method=SMALL, **door).shape == q.shape


def test_cost_counts_the_recursion() -> None:
    method = HyperAttention(block_size=8, sample_size=8, bits=7, min_seq_len=16)
    # four leaves of 16, one block of 32 x 32, two of 16 x 16
    assert method.cost(64).pairs == (4 * 16 * 17 / 2 + 32 * 16 + 2 * 16 * 16) / 64
    assert method.cost(64).selection_pairs == (7 * 128 + 64) / 64
    assert method.cost(16).pairs == 8.5
    # doubling a length adds one level, half of whose queries list a bucket and a sample
    assert method.cost(2**14).pairs - method.cost(2**11).pairs == 3 * 16 / 2
    full = method.cost(1000, is_causal=False)
    assert (full.pairs, full.exact_pairs, full.complete) == (16, 1000, True)
    assert method.cost(15, is_causal=False).pairs == 15
    assert method.cost(0).pairs == 0


def test_declarations_and_bad_sizes() -> None:
    assert HyperAttention().looks_ahead is LookAhead.SEQUENCE
    assert HyperAttention().complete
    assert repr(HyperAttention()) == "HyperAttention(block_size=256, sample_size=256, bits=7, min_seq_len=4096)"
    for bad in ({"block_size": 0}, {"sample_size": -1}, {"bits": 0}, {"min_seq_len": 0}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            HyperAttention(**bad)
