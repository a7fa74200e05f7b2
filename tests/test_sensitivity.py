"""Sensitivities: what bounds them does, what attains them does, and one pass, several workers and sketches say the same."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention import sensitivity
from hyperattention.sensitivity import even_power


def keys(num: int, dim: int, *, lists: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(lists, num, dim, generator=generator, dtype=torch.float64) + 0.5
    # a few keys that stand out, in size and in direction
    k[:, 7:8] *= 30
    k[:, 11:12, 0] += 9
    return k


def ratios(k: Tensor, y: Tensor, power: float) -> Tensor:
    """Share of every key in the row of every query: ``[lists, queries, keys]``."""
    weight = (y @ k.mT).abs() ** power
    return weight / weight.sum(-1, keepdim=True)


# what is added to a diagonal of ones, 1e-12, in the units of assert_exact
JITTER = 1e4


def inverse_gram(k: Tensor) -> Tensor:
    return torch.linalg.pinv(k.mT @ k, hermitian=True)


# p = 2


def test_leverage_is_the_largest_share_that_a_query_can_give():
    k = keys(60, 5)
    score = sensitivity.leverage(k)
    attained = ratios(k, k @ inverse_gram(k), 2.0).diagonal(dim1=1, dim2=2)
    assert_exact(score, attained, size=JITTER)
    y = torch.randn(2, 4000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (ratios(k, y, 2.0).amax(1) <= score * (1 + 1e-9)).all()
    assert_exact(score.sum(1), torch.tensor([5.0, 5.0], dtype=torch.float64), size=JITTER)


def test_leverage_knows_nothing_of_coordinates():
    k = keys(60, 5)
    score = sensitivity.leverage(k)
    # a coordinate in another unit, and keys of which only the first count
    assert_exact(
        sensitivity.leverage(k * torch.tensor([1.0, 1e-8, 1e8, 1.0, 1e-3], dtype=torch.float64)), score, size=JITTER
    )
    few = sensitivity.leverage(k, torch.tensor([[40], [60]]))
    assert_exact(few[0, :40], sensitivity.leverage(k[:1, :40])[0], size=JITTER)
    assert_same_bits(few[0, 40:], torch.zeros(20, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 3])
def test_keys_that_span_few_dimensions_keep_their_scores(rank):
    k = keys(40, rank) @ keys(rank, 8, seed=3)
    score = sensitivity.leverage(k)
    assert (score - (k @ inverse_gram(k) * k).sum(-1)).abs().max() < 1e-7
    assert (score.sum(1) - rank).abs().max() < 1e-7
    # fewer keys than dimensions: each is alone in some direction
    assert (sensitivity.leverage(keys(4, 8)) - 1).abs().max() < 1e-7
    assert_same_bits(sensitivity.leverage(torch.zeros(2, 5, 3)), torch.zeros(2, 5, dtype=torch.float64))


def test_a_key_that_differs_by_little_is_alone_in_its_direction():
    k = torch.ones(1, 50, 2, dtype=torch.float64)
    k[0, 20, 1] += 1e-7
    score = sensitivity.leverage(k)
    # y = (1, -1) sees this key alone; 1e-9 is what its coordinates are rounded to
    assert abs(score[0, 20].item() - 1) < 1e-8
    assert (score[0, :20] - 1 / 49).abs().max() < 1e-8


def test_a_ridge_and_a_centre():
    k = keys(50, 4)
    x = k - k.mean(1, keepdim=True)
    g = x.mT @ x
    least = 0.1 * g.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(4, dtype=torch.float64)
    ours = sensitivity.leverage(k, ridge=0.1, centred=True)
    assert_exact(ours, (x @ torch.linalg.inv(g + least) * x).sum(-1), size=JITTER)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_keys_that_are_not_finite_count_nowhere(poison):
    k = keys(50, 4)
    bad = k.clone()
    bad[0, 20, 1] = poison
    others = torch.arange(50) != 20
    for score in (
        sensitivity.leverage,
        sensitivity.online_leverage,
        lambda k: sensitivity.sketched_leverage(k, width=3),
        lambda k: sensitivity.lewis_bounds(k, power=1.5),
        lambda k: sensitivity.even_power_leverage(k, power=4),
    ):
        found = score(bad)
        assert found[0, 20] == 0
        assert_exact(found[:1, others], score(k[:1, others]), size=JITTER)
        assert_exact(found[1], score(k)[1], size=JITTER)


def test_a_sketch_is_unbiased_and_as_precise_as_it_says():
    k, width, draws = keys(40, 12, lists=1), 4, 200
    score = sensitivity.leverage(k)
    relative = torch.stack([sensitivity.sketched_leverage(k, width=width, seed=seed) for seed in range(draws)]) / score
    assert_unbiased(relative, 1.0, largest_error=1.5 * (2 / width / draws) ** 0.5)
    # the variance of 200 draws is known to a tenth
    assert relative.var(0).mean().item() == pytest.approx(2 / width, rel=0.25)
    with pytest.raises(ValueError, match="width=0.: width must be a positive integer"):
        sensitivity.sketched_leverage(k, width=0)


# in one pass, and by several workers


def test_online_scores_are_shares_among_the_keys_so_far():
    k = keys(300, 4)
    lam = 1e-3 * k[:, 0].square().sum(-1) / 4
    ours = sensitivity.online_leverage(k)
    for t in (0, 1, 5, 127, 128, 129, 299):
        g = k[:, : t + 1].mT @ k[:, : t + 1] + lam[:, None, None] * torch.eye(4, dtype=torch.float64)
        expected = torch.einsum("ld,lde,le->l", k[:, t], torch.linalg.inv(g), k[:, t])
        assert (ours[:, t] - expected).abs().max() < 1e-9
    bound = 4 * torch.log1p(k.square().sum((1, 2)) / (4 * lam))
    assert (ours.sum(1) <= bound).all()


@pytest.mark.parametrize("cut", [1, 100, 128, 200])
def test_online_scores_do_not_look_ahead(cut):
    k = keys(300, 4)
    ours = sensitivity.online_leverage(k)
    assert_same_bits(sensitivity.online_leverage(k[:, :cut]), ours[:, :cut])
    other = torch.cat([k[:, :cut], torch.full_like(k[:, cut:], torch.nan)], 1)
    assert_same_bits(sensitivity.online_leverage(other)[:, :cut], ours[:, :cut])
    # zeros in front have score 0, and decide no ridge
    assert_exact(sensitivity.online_leverage(torch.cat([torch.zeros_like(k[:, :3]), k], 1))[:, 3:], ours, size=JITTER)


def test_a_ridge_is_needed_in_one_pass():
    with pytest.raises(ValueError, match=r"ridge=0.0\): ridge must be positive"):
        sensitivity.online_leverage(keys(5, 3), ridge=0.0)


def test_shares_of_several_workers_add_up():
    k = keys(90, 5)
    shares = [sensitivity.key_rows(part) for part in k.split([20, 50, 20], 1)]
    factor = sensitivity.whitening(sensitivity.sum_grams([sensitivity.gram(share) for share in shares]))
    score = torch.cat([sensitivity.squared_norms(share, factor) for share in shares], 1)
    assert_exact(score, sensitivity.leverage(k), size=JITTER)
    with pytest.raises(ValueError, match=r"shapes \[\(2, 5, 5\), \(2, 6, 6\)\] cannot be added"):
        sensitivity.sum_grams([sensitivity.gram(shares[0]), torch.zeros(2, 6, 6, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"shapes \[\] cannot be added"):
        sensitivity.sum_grams([])


WORKER = """
import sys, torch, torch.distributed as dist
from hyperattention import sensitivity
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
k = torch.randn(1, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
rows = sensitivity.key_rows(k[:, : 8] if rank == 0 else k[:, 8:])
own = sensitivity.gram(rows)
before = own.clone()
score = sensitivity.squared_norms(rows, sensitivity.whitening(sensitivity.reduce_gram(own)))
assert torch.equal(own, before)
expected = sensitivity.leverage(k)[:, :8] if rank == 0 else sensitivity.leverage(k)[:, 8:]
assert (score - expected).abs().max() < 1e-10
dist.destroy_process_group()
"""


@pytest.mark.heavy
def test_two_processes_reduce_their_gram_matrices(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in started:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made, apart from views of the keys."""

    def __init__(self, k: Tensor) -> None:
        super().__init__()
        self.numbers, self.own = 0, k.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() != self.own:
                self.numbers = max(self.numbers, each.numel())
        return out


SCORES = {
    "leverage": sensitivity.leverage,
    "centred": lambda k: sensitivity.leverage(k, ridge=1e-3, centred=True),
    "sketched": lambda k: sensitivity.sketched_leverage(k, width=8),
    "online": sensitivity.online_leverage,
    "lewis": lambda k: sensitivity.lewis_bounds(k, power=3, rounds=1),
    "even power": lambda k: sensitivity.even_power_leverage(k, power=4),
}


@pytest.mark.parametrize("name", SCORES)
def test_the_workspace_does_not_grow_with_the_keys(name):
    dim, chunk = 16, 1024
    work = {}
    for num in (4096, 16384):
        k = keys(num, dim, lists=1)
        with Largest(k) as made:
            SCORES[name](k)
        work[num] = made.numbers
        # one number per key for scores and flags, and a chunk; never keys x head_dim, with room for the larger features
        assert made.numbers <= max(num, chunk * dim, 256 * 136 if name == "even power" else 0)
        assert made.numbers < num * dim or num == 4096
    assert work[16384] <= max(work[4096], 16384)


# other powers


def tensor_power_leverage(k: Tensor, degree: int) -> Tensor:
    made = k
    for _ in range(degree - 1):
        made = torch.einsum("lna,lnb->lnab", made, k).flatten(2)
    q, _, _ = torch.linalg.svd(made, full_matrices=False)
    rank = torch.linalg.matrix_rank(made)
    return torch.stack([u[:, :r].square().sum(-1) for u, r in zip(q, rank, strict=True)])


@pytest.mark.parametrize(("power", "num"), [(2, 30), (4, 8), (4, 40), (6, 15), (6, 60)])
def test_even_powers_by_either_gram_matrix(power, num):
    # 10 monomials of degree 2 in 4 coordinates, 20 of degree 3: by keys below that, by monomials above
    k = keys(num, 4)
    ours = sensitivity.even_power_leverage(k, power=power)
    # the singular values of a tensor power spread over powers of those of the keys
    assert (ours - tensor_power_leverage(k, power // 2)).abs().max() < 1e-6
    assert (ours.sum(1) <= sensitivity.sum_of_bounds(4, power) + 1e-9).all()


def test_monomials_of_repeated_coordinates():
    index, root = even_power._monomials(3, 3, torch.zeros(1, dtype=torch.float64))
    x, y = (torch.randn(3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    ours = ((root * x[index].prod(0)) * (root * y[index].prod(0))).sum()
    assert_exact(ours[None], ((x @ y) ** 3)[None])


def test_a_power_that_fills_the_memory_is_refused():
    k = torch.zeros(1, 50_000, 64)
    with pytest.raises(
        ValueError, match=r"power=6, head_dim=64, 50000 keys: .* 45,760 .* 15.6 GiB, above the limit of 1 GiB"
    ):
        sensitivity.even_power_leverage(k, power=6)
    for wrong in (3, 0, -2):
        with pytest.raises(ValueError, match=f"power={wrong}\\): the power must be even and at least 2"):
            sensitivity.even_power_leverage(k, power=wrong)


@pytest.mark.parametrize("power", [1, 1.5, 2, 3, 4, 5, 8])
def test_lewis_weights_are_their_own_leverage(power):
    k = keys(60, 4, lists=1)
    weight = sensitivity.lewis_weights(k, power=power, rounds=60 if power < 4 else 100)
    again = sensitivity.leverage(k * weight[..., None] ** (0.5 - 1 / power))
    # for p >= 4 the ascent converges like 1 / rounds in keys whose weight vanishes
    assert (weight - again).abs().max() < (1e-9 if power < 4 else 3e-3)
    assert (weight.sum(1) - 4).abs().max() < 1e-6
    if power == 2:
        assert_exact(weight, sensitivity.leverage(k), size=JITTER)


@pytest.mark.parametrize(("power", "rounds"), [*itertools.product([1, 1.5, 3, 3.8, 5], [1, 2, 40])])
def test_lewis_bounds_hold_before_the_weights_converge(power, rounds):
    k = keys(50, 3)
    bound = sensitivity.lewis_bounds(k, power=power, rounds=rounds)
    y = torch.randn(2, 3000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # queries that a key's own share of a power is large for: among others, those that other keys hardly see
    y = torch.cat(
        [y, k @ inverse_gram(k), torch.linalg.cross(*torch.broadcast_tensors(k[:, :, None], k[:, None])).flatten(1, 2)], 1
    )
    share = ratios(k, y[:, :][:, (y.norm(dim=-1) > 0).all(0)], power).amax(1)
    assert (share <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_lewis_bounds_hold_for_exact_sensitivities_of_the_plane(rounds):
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(200, 8, 2, generator=generator, dtype=torch.float64)
    k *= torch.exp(2 * torch.randn(200, 8, 1, generator=generator, dtype=torch.float64))
    # for p = 1 the share is largest for a query at right angles to some key
    share = ratios(k, torch.stack([-k[..., 1], k[..., 0]], -1), 1.0).amax(1)
    bound = sensitivity.lewis_bounds(k, power=1, rounds=rounds)
    assert (share <= bound * (1 + 1e-9)).all()
    # some bounds are nearly attained
    assert (share / bound).max() > 0.99


@pytest.mark.parametrize("power", [0.99, 0, -1, float("inf"), float("nan")])
def test_powers_below_one_and_infinite_ones_are_refused(power):
    for call in (sensitivity.lewis_bounds, sensitivity.lewis_weights, sensitivity.sensitivity_bounds):
        with pytest.raises(ValueError, match=f"p is {power!r}; it must be a finite number of at least 1"):
            call(keys(5, 3), power=power)


@pytest.mark.parametrize("shape", [(1, 0, 4), (0, 5, 4), (1, 1, 4)])
@pytest.mark.parametrize("power", [1, 2, 3, 4, 5])
def test_few_keys_or_none(shape, power):
    k = torch.ones(shape)
    assert sensitivity.sensitivity_bounds(k, power=power).shape == shape[:2]
    assert sensitivity.online_leverage(k).shape == shape[:2]
    if shape == (1, 1, 4):
        assert sensitivity.sensitivity_bounds(k, power=power).item() == pytest.approx(1, abs=1e-6)
