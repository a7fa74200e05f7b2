"""SubGen as published: what it keeps follows the laws of its draws, and its error those of its theorem."""

import math

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.policies import online_clusters
from hyperattention.policies.subgen_sketch import SketchSizes, SubGenSketch
from hyperattention.random import uniform

DELTA = 0.8


def clusterable(num: int, balls: int = 10, *, heads: int = 1, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys in balls of diameter `DELTA`, the same in every head, and values of unequal norms."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(balls, dim, generator=generator), dim=-1) * 2
    offset = torch.nn.functional.normalize(torch.randn(num, dim, generator=generator), dim=-1)
    ball = torch.cat([torch.arange(balls), torch.randint(balls, (max(0, num - balls),), generator=generator)])[:num]
    k = centres[ball] + offset * torch.rand(num, 1, generator=generator) * DELTA / 2
    v = torch.randn(num, dim, generator=generator) * (0.2 + torch.rand(num, 1, generator=generator)) + 0.3
    return tuple(x.double().expand(1, heads, -1, -1) for x in (k, v))


def scattered(num: int, dim: int = 6, batch: int = 1, heads: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(batch, heads, num, dim, generator=generator) for _ in range(2))


def absorb(
    sketch: SubGenSketch, k: Tensor, v: Tensor, *, step: int | None = None, live: Tensor | None = None
) -> SubGenSketch:
    live = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if live is None else live
    for start in range(0, k.shape[2], step or k.shape[2]):
        part = slice(start, min(k.shape[2], start + (step or k.shape[2])))
        sketch.absorb(k[:, :, part], v[:, :, part], torch.arange(k.shape[2])[part], live[:, part])
    return sketch


def sketched(
    k: Tensor, v: Tensor, samples: int = 4, draws: int = 32, *, seed: int = 0, delta: float = DELTA
) -> SubGenSketch:
    return absorb(SubGenSketch(SketchSizes(delta, samples, draws), counters=(seed, 0)), k, v)


def tensors(sketch: SubGenSketch) -> list[Tensor]:
    return [x for part in sketch.held for x in part.tensors]


def queries(heads: int, num: int = 3, dim: int = 6) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(9)).double().expand(1, heads, -1, -1)


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, lse and weights of the first head."""
    scores = q[0, 0] @ k[0, 0].T * q.shape[3] ** -0.5
    return scores.softmax(-1) @ v[0, 0], scores.logsumexp(-1), scores.softmax(-1)


def test_what_is_kept_is_what_the_published_loop_keeps() -> None:
    k, v = scattered(90, dim=3, heads=2)
    samples, draws, delta, seed, layer = 3, 5, 1.2, 7, 4
    sketch = absorb(SubGenSketch(SketchSizes(delta, samples, draws), counters=(seed, layer)), k, v)
    clusters, drawn = sketch.held
    for head in range(2):
        found: list[list[int]] = []
        for token, key in enumerate(k[0, head]):
            distance = [(key - k[0, head, members[0]]).norm().item() for members in found]
            if not distance or min(distance) > delta:
                found.append([token])
            else:
                found[distance.index(min(distance))].append(token)
        assert clusters.num[0, head] == len(found) > 5
        assert clusters.count[0, head, : len(found)].tolist() == [len(members) for members in found]
        assert max(len(members) for members in found) > 10
        for cluster, members in enumerate(found):
            assert_same_bits(clusters.centre[0, head, cluster], k[0, head, members[0]])
            for slot in range(samples):
                chance = [uniform((seed, layer, 1, head, slot, token), "cpu").item() for token in members]
                winner = members[chance.index(min(chance))]
                assert_same_bits(clusters.sample[0, head, cluster, slot], k[0, head, winner])
        norm = [value.double().square().sum().item() for value in v[0, head]]
        for slot in range(draws):
            chance = [uniform((seed, layer, 2, head, slot, token), "cpu").item() for token in range(90)]
            time = [-math.log(1 - u) / size for u, size in zip(chance, norm, strict=True)]
            winner = time.index(min(time))
            assert_same_bits(drawn.k[0, head, slot], k[0, head, winner])
            assert_same_bits(drawn.v[0, head, slot], v[0, head, winner])
        assert_exact(drawn.total[0, head], torch.tensor(sum(norm), dtype=torch.float64))


@pytest.mark.parametrize("step", [1, 7, 300])
@pytest.mark.parametrize("kind", ["clusterable", "scattered"])
def test_many_at_a_time_is_one_after_another_to_the_bit(kind: str, step: int) -> None:
    k, v = clusterable(700, heads=2) if kind == "clusterable" else scattered(700, batch=2, heads=2)
    delta = DELTA if kind == "clusterable" else 1.6
    live = torch.arange(700) >= torch.tensor([[0], [60]])[: k.shape[0]]
    one, many = (
        absorb(SubGenSketch(SketchSizes(delta, 3, 16)), k, v, step=size, live=live) for size in (step, 700)
    )  # 700 tokens are more than are taken in at once
    assert many.num_clusters.max() < 700
    for ours, expected in zip(tensors(one), tensors(many), strict=True):
        assert_same_bits(ours, expected)


def test_a_key_joins_the_nearest_centre_not_the_first() -> None:
    k = torch.tensor([[0.0], [1.5], [0.9]]).expand(1, 1, -1, -1)
    clusters, _ = sketched(k, k, delta=1.0).held
    assert clusters.count[0, 0, :2].tolist() == [1, 2]


def test_balls_of_diameter_delta_open_no_more_clusters_than_there_are() -> None:
    assert sketched(*clusterable(500, 10)).num_clusters.item() == 10


def test_samples_are_uniform_over_their_cluster_and_draws_follow_the_norms() -> None:
    heads, samples = 3000, 2
    k = (torch.arange(6.0) / 100).view(1, 1, 6, 1).expand(1, heads, -1, -1)
    v = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0, 2.0]).view(1, 1, 6, 1).expand(1, heads, -1, -1)
    clusters, drawn = sketched(k, v, samples, 2).held
    picked = (clusters.sample[0, :, 0] == k[0, 0].view(1, 1, 6)).double()  # [heads, samples, keys]
    assert_unbiased(picked.flatten(0, 1), torch.full((6,), 1 / 6), largest_error=0.006)
    # two slots of one cluster are independent
    assert_unbiased(picked[:, 0, 0] * picked[:, 1, 0], 1 / 36, largest_error=0.004)
    share = v[0, 0, :, 0].square() / v[0, 0].square().sum()
    drawn_key = (drawn.k[0] == k[0, 0].view(1, 1, 6)).double()
    assert_unbiased(drawn_key.flatten(0, 1), share, largest_error=0.008)
    # a value of norm zero is never drawn
    assert drawn_key[:, :, 2].sum() == 0


def test_normaliser_and_numerator_are_unbiased() -> None:
    heads = 2048
    k, v = clusterable(300, heads=heads)
    q = queries(heads)
    out, lse, _ = exact(q, k, v)
    estimate = sketched(k, v, 2, 24).attend(q)
    tau = (estimate.lse[0] - lse).exp()  # [heads, queries]
    assert_unbiased(tau, 1.0, largest_error=0.003)
    assert_unbiased(estimate.out[0] * tau[..., None], out, largest_error=0.02)


def _error(samples: int, draws: int, k: Tensor, v: Tensor, q: Tensor, seed: int = 0) -> Tensor:
    return (sketched(k, v, samples, draws, seed=seed).attend(q).out[0] - exact(q, k, v)[0]).norm(dim=-1)  # [heads, queries]


@pytest.mark.heavy
def test_four_times_the_samples_halve_the_error() -> None:
    heads = 200
    k, v = clusterable(400, heads=heads)
    for seed in range(3):
        few, many = (_error(t, s, k, v, queries(heads), seed).square().mean().sqrt() for t, s in ((2, 64), (8, 256)))
        # 2 in the limit; the root mean squares of 600 errors are known to 5%
        assert 1.7 <= (few / many).item() <= 2.35


@pytest.mark.parametrize(
    ("num", "balls", "samples", "draws"),
    [(400, 10, 8, 64), (1600, 10, 2, 256), pytest.param(1600, 40, 32, 512, marks=pytest.mark.heavy)],
)
def test_error_is_within_the_bound_of_the_theorem(num: int, balls: int, samples: int, draws: int) -> None:
    heads = 100
    k, v = clusterable(num, balls, heads=heads)
    q = queries(heads)
    _, _, weights = exact(q, k, v)
    spectral = torch.linalg.matrix_norm(v[0, 0], 2)
    # the variance of a draw of values is at most ||V||_F^2 ||softmax||^2 / s, and ||V||_F^2 at most head_dim ||V||_op^2
    rank = (v[0, 0].square().sum() / spectral**2).item()
    assert rank <= v.shape[3]
    # two keys of a cluster are at most 2 delta apart, so the largest term of a cluster is at most `spread` times the least
    spread = (2 * DELTA * q[0, 0].norm(dim=-1) * q.shape[3] ** -0.5).exp()
    variance = (spread - 1) ** 2 / (4 * spread)
    epsilon = (rank / draws) ** 0.5 + (variance / samples).sqrt()  # [queries]
    unit = weights.norm(dim=-1) * spectral
    ratio = _error(samples, draws, k, v, q) / unit
    measured = ratio.square().mean(0).sqrt()
    assert (measured <= epsilon).all()
    # Chebyshev, at four times the root of the mean square
    assert ((ratio > 4 * epsilon).double().mean(0) <= 1 / 16).all()
    # and the bound says something
    assert (measured >= epsilon / 20).all()


def test_memory_does_not_grow_with_keys_that_are_clusterable() -> None:
    few, many = (sketched(*clusterable(num, 12)) for num in (512, 16 * 512))
    assert few.num_clusters.item() == many.num_clusters.item() == 12
    assert many.memory_bytes <= 1.5 * few.memory_bytes
    # room is doubled, so that it is never more than twice what is needed
    assert many.held[0].count.shape[2] < 2 * 12
    # the other way round: keys that are not clusterable cost memory
    few, many = (sketched(*scattered(num), delta=0.1) for num in (64, 16 * 64))
    assert many.memory_bytes >= 8 * few.memory_bytes


def test_work_per_token_is_constant_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, true = [0], online_clusters._distances

    def counting(k: Tensor, centre: Tensor) -> Tensor:
        counted[0] += k.shape[0] * k.shape[1] * centre.shape[1]
        return true(k, centre)

    monkeypatch.setattr(online_clusters, "_distances", counting)
    k, v = clusterable(8192, 12)
    sketch, spent = SubGenSketch(SketchSizes(DELTA, 2, 8)), []
    for start in range(0, 8192, 64):
        part = slice(start, start + 64)
        counted[0] = 0
        sketch.absorb(k[:, :, part], v[:, :, part], torch.arange(8192)[part], torch.ones(1, 64, dtype=torch.bool))
        spent.append(counted[0] / 64)
    assert spent[1] == spent[-1] == 12


def test_a_radius_of_zero_makes_the_normaliser_exact() -> None:
    k, v = scattered(50)
    q = queries(1).float()
    assert_exact(sketched(k, v, delta=0.0).attend(q).lse[0, 0], exact(q, k, v)[1])


def test_padding_is_as_if_it_had_not_come() -> None:
    k, v = scattered(120, batch=2, heads=2)
    live = torch.rand(2, 120, generator=torch.Generator().manual_seed(1)) < 0.7
    poisoned = k.masked_fill(~live[:, None, :, None], torch.nan)
    ours = absorb(SubGenSketch(SketchSizes(1.5, 3, 16)), poisoned, v, live=live)
    for row in range(2):
        place = live[row].nonzero()[:, 0]
        alone = SubGenSketch(SketchSizes(1.5, 3, 16))
        alone.absorb(k[row : row + 1, :, place], v[row : row + 1, :, place], place, live[row : row + 1, place])
        most = int(alone.num_clusters.max())
        *clusters, num = zip(ours.held[0].tensors, alone.held[0].tensors, strict=True)
        for x, y in clusters:  # rows of a batch share their room
            assert_same_bits(x[row : row + 1, :, :most], y[:, :, :most])
        assert_same_bits(num[0][row : row + 1], num[1])
        for x, y in zip(ours.held[1].tensors, alone.held[1].tensors, strict=True):
            assert_same_bits(x[row : row + 1], y)


def test_values_of_zero_give_zero() -> None:
    k, _ = scattered(40)
    estimate = sketched(k, torch.zeros_like(k), delta=1.5).attend(queries(1).float())
    assert_exact(estimate.out, torch.zeros_like(estimate.out))
    assert torch.isfinite(estimate.lse).all()


def test_the_same_counters_give_the_same_bits_and_others_do_not() -> None:
    k, v = clusterable(200)
    state = torch.get_rng_state()
    first, again, other = (sketched(k, v, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for x, y in zip(tensors(first), tensors(again), strict=True):
        assert_same_bits(x, y)
    assert not torch.equal(first.held[0].sample, other.held[0].sample)
    assert not torch.equal(first.held[1].k, other.held[1].k)


def test_more_clusters_than_allowed_say_what_to_change() -> None:
    k, v = scattered(80, heads=2)
    sketch = SubGenSketch(SketchSizes(0.25, 2, 8, most_clusters=20), counters=(0, 3))
    with pytest.raises(ValueError, match="head . of layer 3 needs more than 20 clusters of radius delta=0.25.*larger"):
        absorb(sketch, k, v)
