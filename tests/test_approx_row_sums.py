"""Estimated row sums, on inputs that meet the assumptions of the analysis."""

import math

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.experimental.approx_row_sums import ApproxD
from hyperattention.select.locate.hash_buckets import HashBuckets

KEYS = 256
HEADS = 48


def benign() -> tuple[Tensor, Tensor]:
    """One head whose row sums are alike and whose columns are light, repeated so that every repetition draws for itself."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, KEYS, 8, generator=generator, dtype=torch.float64)
    q, k = (0.7 * x / x.norm(dim=-1, keepdim=True) * 8**0.25 for x in (q, k - k.mean(0)))
    return q.repeat(1, HEADS, 1, 1), k.repeat(1, HEADS, 1, 1)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k = benign()
    entries = (q[:, :1] @ k[:, :1].transpose(2, 3)).exp()
    sums = entries.sum(-1)
    kappa = (sums.max() / sums.min()).item()
    alpha = KEYS * (entries / sums[..., None]).square().sum(2).max().item()
    assert kappa <= 1.5
    assert alpha <= 2
    assert entries.std() / entries.mean() > 0.2, "entries all alike would make any sample right"
    return q, k, sums


def errors(estimate: ApproxD, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    q, k, sums = inputs
    return estimate(q, k, scale=1.0) / sums - 1


@pytest.mark.parametrize("heavy", [None, HashBuckets(32)])
def test_within_epsilon(inputs, heavy: HashBuckets | None) -> None:
    assert errors(ApproxD(1024, epsilon=0.1, heavy=heavy), inputs).abs().max() <= 0.1


@pytest.mark.parametrize("heavy", [None, HashBuckets(32)])
def test_error_falls_as_the_root_of_the_samples(inputs, heavy: HashBuckets | None) -> None:
    counts = [64, 128, 256, 512, 1024]
    error = [errors(ApproxD(m, epsilon=0.2, heavy=heavy), inputs).abs().mean().item() for m in counts]
    x, y = (torch.tensor([math.log(z) for z in values]) for values in (counts, error))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert -0.65 <= slope.item() <= -0.35


def test_unbiased_and_heavy_pairs_count_once(inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate, none = ApproxD(128, epsilon=0.5, heavy=HashBuckets(32)), torch.zeros(KEYS, dtype=torch.float64)
    assert_unbiased(errors(estimate, inputs)[0], none, largest_error=0.01)
    kept = ApproxD._heavy
    # planted: sampled keys of the own bucket are not left out
    monkeypatch.setattr(ApproxD, "_heavy", lambda self, problem: (kept(self, problem)[0], None))
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        assert_unbiased(errors(estimate, inputs)[0], none, largest_error=0.01)


def test_a_mask_of_everything_is_exact(inputs) -> None:
    q, k, sums = inputs
    ours = ApproxD(4, heavy=HashBuckets(KEYS))(q[:, :2], k[:, :2], scale=1.0)
    assert_exact(ours, sums.expand_as(ours))


def test_the_cap_bounds_what_a_sampled_key_can_do(inputs) -> None:
    q, k, sums = inputs
    samples, constant = 64, 0.5
    capped = ApproxD(samples, kappa=1.5, epsilon=0.1, cap_constant=constant)(q, k, scale=1.0)
    free = ApproxD(samples, kappa=1.5, epsilon=0.1, cap_constant=math.inf)(q, k, scale=1.0)
    assert bool((capped <= free).all())
    # tau is the largest row sum of those looked at; nothing is masked, so the floor is all there is in the cap
    tau = sums.max()
    cap = constant * 0.1**2 * samples / (KEYS * math.log(KEYS)) * tau / 1.5
    assert bool((capped <= torch.maximum(KEYS * cap, tau / 1.5) + 1e-9).all())
    assert capped.mean() < free.mean()


def test_the_floor_is_tau_over_kappa(inputs) -> None:
    q, k, sums = inputs
    # a cap of nothing leaves only the floor; 4096 rows looked at are all rows but with negligible probability
    floor = ApproxD(4096, kappa=3.0, cap_constant=1e-12)(q[:, :2], k[:, :2], scale=1.0)
    assert_exact(floor, (sums.max() / 3).expand_as(floor))


def test_groups_share_a_sample_and_seeds_do_not(inputs) -> None:
    q, k, _ = inputs
    estimate = ApproxD(16, heavy=HashBuckets(32))
    first = estimate(q[:, :4], k[:, :2], scale=1.0)
    assert_exact(first[:, 0], first[:, 1])
    assert not torch.equal(first[:, 0], first[:, 2])
    assert_same_bits(estimate(q[:, :4], k[:, :2], scale=1.0), first)
    assert not torch.equal(estimate(q[:, :4], k[:, :2], scale=1.0, seed=1), first)


def test_logs_do_not_overflow_and_few_tokens_are_served() -> None:
    q, k = 60 * torch.ones(1, 1, 5, 4), 60 * torch.ones(1, 1, 7, 4)
    assert torch.isfinite(ApproxD(4).log_row_sums(q, k, scale=1.0)).all()
    assert ApproxD(4)(q[:, :, :0], k, scale=1.0).shape == (1, 1, 0)
    assert_same_bits(ApproxD(4)(q, k[:, :, :0], scale=1.0), torch.zeros(1, 1, 5))
    assert_exact(ApproxD(4)(q / 60, k[:, :, :1] / 60, scale=1.0), torch.full((1, 1, 5), math.exp(4)))


def test_bad_constants() -> None:
    for bad in (
        {"num_samples": 0},
        {"kappa": 0.5},
        {"kappa": math.inf},
        {"epsilon": 0.0},
        {"epsilon": 1.0},
        {"cap_constant": 0.0},
    ):
        with pytest.raises(ValueError, match="ApproxD"):
            ApproxD(**({"num_samples": 4} | bad))
