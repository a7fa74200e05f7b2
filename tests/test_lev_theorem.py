"""The theorem of LevAttention, as a test: every large entry of every row of every query lies in U, and U is small."""

import pytest
import torch
from torch import Tensor

import hyperattention as ha
from hyperattention.problem import Problem
from hyperattention.sensitivity import online_leverage, sensitivity_bounds, sum_of_bounds, universal

NUM, DIM = 60, 4
EPSILONS = (0.02, 0.1, 0.5)
# one power of each way to bound sensitivities, and further ones
POWERS = (1, 2, 3, 4, *(pytest.param(power, marks=pytest.mark.heavy) for power in (1.5, 5, 6)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted() -> Tensor:
    k = normal(NUM, DIM)
    k[[3, 17, 40]] = 30 * normal(3, DIM, seed=1)
    return k


def alone() -> Tensor:
    """One key sees a direction that no other sees, by little; the coordinates are mixed, so that no unit tells it."""
    k = normal(NUM, DIM)
    k[:, 3] = 0
    k[20, 3] = 1e-6
    return k @ torch.linalg.qr(normal(DIM, DIM, seed=2))[0]


def tight() -> Tensor:
    """Every key has a sensitivity of DIM / NUM for every p: no set of fewer keys will do below that."""
    return torch.eye(DIM, dtype=torch.float64).repeat(NUM // DIM, 1)


KEYS = {
    "random": lambda: normal(NUM, DIM),
    "planted": planted,
    "alone in a direction": alone,
    "tight": tight,
    "duplicates": lambda: normal(6, DIM).repeat(NUM // 6, 1),
    "ever smaller": lambda: normal(NUM, DIM) * 2.0 ** -torch.arange(NUM, dtype=torch.float64)[:, None],
    "of low rank": lambda: normal(NUM, 2) @ normal(2, DIM, seed=1),
    "fewer than dimensions": lambda: normal(DIM - 1, DIM),
    "some of zeros": lambda: normal(NUM, DIM) * (torch.arange(NUM) % 3 > 0)[:, None],
    "far from the origin": lambda: 0.01 * normal(NUM, DIM) + 5,
}


def queries(k: Tensor, power: float) -> Tensor:
    """Random queries, the keys themselves, and for every key the query that gives it the largest share, or next to it."""
    best = k @ torch.linalg.pinv(k.T @ k, hermitian=True, rtol=1e-14)
    made = [normal(200, DIM, seed=3), k, best]
    for _ in range(3):
        # the largest share is attained at y = (sum_l |<k_l, y>|^{p - 2} k_l k_l')^-1 k_j: each y proposes the next
        weight = (best @ k.T).abs().clamp(min=1e-12) ** (power - 2)  # [queries, keys]
        gram = torch.einsum("ql,ld,le->qde", weight, k, k)
        # a little on the diagonal, for keys of low rank
        gram = gram + 1e-14 * gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(DIM, dtype=k.dtype)
        best = torch.linalg.solve_ex(gram, k[..., None])[0][..., 0]
        best = best / best.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        made.append(best)
    q = torch.cat(made)
    return q[torch.isfinite(q).all(1)]


def shares(q: Tensor, k: Tensor, power: float) -> Tensor:
    size = (q @ k.T).abs()
    weight = (size / size.amax(1, keepdim=True).clamp(min=1e-300)) ** power
    return weight / weight.sum(1, keepdim=True).clamp(min=1e-300)


def check(k: Tensor, power: float, epsilons: tuple[float, ...]) -> list[int]:
    """Check the theorem, and return for each epsilon how many keys some query gives that share."""
    bound, total, found = sensitivity_bounds(k[None], power=power), torch.tensor([[len(k)]]), []
    largest = shares(queries(k, power), k, power).amax(0)
    for epsilon in epsilons:
        chosen = universal.at_least(bound, epsilon, total)[0]
        inside = torch.zeros(len(k), dtype=torch.bool).scatter(0, chosen, True)
        large = largest >= epsilon
        missing = (large & ~inside).nonzero()[:, 0].tolist()
        assert not missing, f"p={power}, epsilon={epsilon}: {missing} missing"
        # the threshold is lowered by a millionth for rounding
        assert len(chosen) <= sum_of_bounds(DIM, power) / epsilon * (1 + 1e-5)
        found.append(int(large.sum()))
    # the paper's form of the bound
    assert sum_of_bounds(DIM, power) <= DIM ** max(1.0, power / 2)
    return found


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", KEYS)
def test_every_large_entry_is_in_the_universal_set(name, power):
    # the smallest epsilon is met by some key: the theorem says something
    assert check(KEYS[name](), power, EPSILONS)[0] > 0


@pytest.mark.parametrize("power", [1, 2, 4])
def test_a_set_that_is_too_small_is_noticed(monkeypatch, power):
    sound = universal.at_least
    monkeypatch.setattr(universal, "at_least", lambda score, epsilon, total: sound(score, 1.1 * epsilon, total))
    with pytest.raises(AssertionError, match="missing"):
        # every key attains its bound, DIM / NUM
        check(tight(), power, (DIM / NUM,))


def test_the_method_takes_this_set_and_the_bound_on_its_size_is_attained():
    for k in (tight(), planted()):
        problem = Problem(normal(1, 1, 1, DIM), k[None, None], k[None, None], 1.0)
        for power in (1, 2, 4):
            chosen = ha.LevAttention(epsilon=DIM / NUM, p=power).universal_set(problem)[0, 0]
            expected = (sensitivity_bounds(k[None], power=power)[0] >= DIM / NUM * (1 - 1e-6)).nonzero()[:, 0]
            assert chosen.tolist() == expected.tolist()
            if power < 4 and torch.equal(k, tight()):
                # each key has a sensitivity of 1/15, and all of them are needed
                assert len(chosen) == NUM == round(sum_of_bounds(DIM, power) / (DIM / NUM))


@pytest.mark.parametrize("name", ["random", "planted", "ever smaller"])
def test_online_scores_bound_every_entry_of_causal_rows(name):
    k, epsilon = KEYS[name](), 0.1
    lam = 1e-3 * k[0].square().sum() / DIM
    score = online_leverage(k[None])[0]
    some = 0
    for last in (5, 20, NUM - 1):
        seen = k[: last + 1]
        q = queries(seen, 2.0)
        # the ridge hides no more of an entry than its share of a row's weight
        size = (q @ seen.T).square().sum(1)
        entry = (q @ seen.T).square() / (size + lam * q.square().sum(1))[:, None]
        # scores are differences from 1, of numbers rounded in units of the largest key
        assert (entry.amax(0) <= score[: last + 1] + 1e-9).all()
        some += int((entry >= epsilon).any(0).sum())
    assert some > 0
