"""Structured inputs have the statistics they claim, and a shorter text is the beginning of a longer one."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hyperattention.synthetic import Inputs, gaussian, structured

NUM_TOKENS, WINDOW = 2048, 256


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return structured(NUM_TOKENS, heads=4)


@pytest.fixture(scope="module")
def weights(inputs: Inputs) -> Tensor:
    scores = inputs.q @ inputs.k.mT / math.sqrt(inputs.q.shape[-1])
    seen = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


def second_half(weights: Tensor) -> Tensor:
    return weights[0, :, NUM_TOKENS // 2 :]


def same_beginning(short: Inputs, long: Inputs) -> None:
    for name in ("q", "k", "v"):
        x = getattr(short, name)
        assert torch.equal(x, getattr(long, name)[..., : x.shape[-2], :]), name
    live = long.needle_query < short.q.shape[-2]
    assert torch.equal(short.needle_query, long.needle_query[live])
    assert torch.equal(short.needle_key, long.needle_key[..., live])


def test_norms_are_the_reported_ones(inputs: Inputs) -> None:
    for x, low, high in ((inputs.q, 14, 19), (inputs.k, 14, 16), (inputs.v, 2.5, 3.5)):
        norms = x.norm(dim=-1).mean(-1)
        assert low < norms.min() <= norms.max() < high


def test_queries_and_keys_lie_in_narrow_cones(inputs: Inputs) -> None:
    for x in (inputs.q, inputs.k):
        cosines = cosine_similarity(x, x.mean(-2, keepdim=True), dim=-1).mean(-1)
        assert 0.5 < cosines.min() <= cosines.max() < 0.97
    assert (cosine_similarity(inputs.q.mean(-2), inputs.k.mean(-2), dim=-1) < -0.1).all()


def test_sinks_take_weight_and_say_little(inputs: Inputs, weights: Tensor) -> None:
    mass = second_half(weights)[..., :4].sum(-1).mean(-1)
    assert 0.1 < mass.min() <= mass.max() < 0.6
    assert inputs.v[..., :4, :].norm(dim=-1).max() < 1
    assert inputs.k[..., :4, :].norm(dim=-1).max() < 8


def test_recent_keys_are_preferred(weights: Tensor) -> None:
    near = weights[0].tril().triu(1 - WINDOW)[:, NUM_TOKENS // 2 :].sum(-1).mean(-1)
    assert 0.25 < near.min() <= near.max() < 0.75
    # a uniform row has at most this share there
    assert (near > 2 * WINDOW / NUM_TOKENS).all()


def test_heads_go_from_diffuse_to_sharp(weights: Tensor) -> None:
    rows = second_half(weights)
    effective = torch.special.entr(rows).sum(-1).exp().median(-1).values
    assert (effective[:-1] > 1.5 * effective[1:]).all()
    assert effective[0] > 100
    assert effective[-1] < 20


def test_needles_are_far_and_sharp_heads_find_them(inputs: Inputs, weights: Tensor) -> None:
    assert len(inputs.needle_query) > 0
    assert (inputs.needle_query - inputs.needle_key > 1024).all()
    assert (inputs.needle_key >= 4).all()
    mass = weights[..., inputs.needle_query, :].gather(-1, inputs.needle_key[..., None]).mean((0, 2, 3))
    assert mass[0] < 0.05
    assert mass[-1] > 0.5
    assert 1 / NUM_TOKENS < mass[1] < mass[2] < mass[3]


def test_heavy_far_keys_are_scattered(weights: Tensor) -> None:
    """A sharp head's far mass sits in a few dozen keys, in more blocks of 64 than would hold them if they lay together."""
    far = second_half(weights)[-1].clone()
    index = torch.arange(NUM_TOKENS)
    far[(index < 16) | (index > index[NUM_TOKENS // 2 :, None] - WINDOW)] = 0
    top = far.topk(32)
    assert 0.5 < (top.values.sum(-1) / far.sum(-1)).mean() < 0.95
    blocks = torch.tensor([len(row.unique()) for row in top.indices // 64]).double()
    assert blocks.mean() > 5


def test_a_short_text_begins_a_long_one() -> None:
    long = structured(2300, head_dim=16)
    for num_tokens in (0, 1, 3, 100, 1500, 2047, 2048, 2049):
        same_beginning(structured(num_tokens, head_dim=16), long)
    long = gaussian(2300, head_dim=8)
    for num_tokens in (0, 1, 100, 2049):
        same_beginning(gaussian(num_tokens, head_dim=8), long)


def test_the_seed_decides_everything_and_torch_rng_is_untouched() -> None:
    state = torch.get_rng_state()
    for make in (structured, gaussian):
        one, again, other = make(64, seed=1), make(64, seed=1), make(64, seed=2)
        assert torch.equal(one.q, again.q)
        assert not any(torch.equal(getattr(one, name), getattr(other, name)) for name in "qkv")
    assert torch.equal(state, torch.get_rng_state())


def test_rows_and_heads_differ_and_heads_of_a_group_share_keys() -> None:
    inputs = structured(64, batch=2, heads=4, kv_heads=2, sharpness=[0.5] * 4)
    assert inputs.k.shape == (2, 2, 64, 64)
    # past the sinks, which no text changes
    for x in (inputs.q, inputs.k[:, :, 4:], inputs.v):
        flat = x.flatten(0, 1)
        assert not any(torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])
    # a wrong pairing of query heads with kv heads would lose the sinks: their axis is the kv head's own
    for h in range(4):
        scores = inputs.q[0, h] @ inputs.k[0, h // 2].T
        assert (scores[32:, 0] > scores[32:, 4:].mean(-1)).all()


@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 3), (33, 64), (128, 128)])
def test_other_sizes_keep_norms(head_dim: int, value_dim: int) -> None:
    inputs = structured(300, head_dim=head_dim, value_dim=value_dim, dtype=torch.bfloat16)
    assert inputs.v.shape[-1] == value_dim
    assert inputs.q.dtype == inputs.k.dtype == inputs.v.dtype == torch.bfloat16
    assert 14 < inputs.k[..., 4:, :].float().norm(dim=-1).mean() < 16
    assert 14 < inputs.q.float().norm(dim=-1).mean() < 20


def test_gaussian_entries_are_standard_normal() -> None:
    inputs = gaussian(1024, heads=2, kv_heads=1, value_dim=32)
    assert inputs.needle_key.shape == (1, 2, 0)
    for x in (inputs.q, inputs.k, inputs.v):
        num = x.numel()
        assert abs(x.mean()) < 4.5 / math.sqrt(num)
        assert abs(x.var() - 1) < 4.5 * math.sqrt(2 / num)
        assert abs((x**4).mean() - 3) < 4.5 * math.sqrt(96 / num)
    assert abs((inputs.q[0, 0] * inputs.k[0, 0]).mean()) < 4.5 / math.sqrt(inputs.k.numel())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": -1}, "num_tokens=-1"),
        ({"num_tokens": 4, "heads": 3, "kv_heads": 2}, "multiple of kv_heads=2"),
        ({"num_tokens": 4, "kv_heads": 0}, "kv_heads=0"),
        ({"num_tokens": 4, "value_dim": 0}, "value_dim=0"),
        ({"num_tokens": 4, "head_dim": 4}, "head_dim=4"),
        ({"num_tokens": 4, "seed": -1}, "seed=-1"),
        ({"num_tokens": 4, "sharpness": [0.5, 0.5]}, "1 values in"),
        ({"num_tokens": 4, "sharpness": [1.5]}, "1.5"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structured(**arguments)
