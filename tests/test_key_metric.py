"""Queries are compared by how their scores differ over the keys that their tile knows."""

from dataclasses import replace

import torch

import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from hyperattention.select import DrawAlike
from hyperattention.select.alike import sort_alike
from hyperattention.select.score import key_metric
from hyperattention.select.score.key_metric import KeyMetric
from hyperattention.tiling import cut
from problems import problem


def keys(count: int, dim: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    # directions of unlike variance, far from the origin, which change along the text
    x = torch.randn(2, count, dim, generator=g) * torch.arange(1.0, dim + 1) + 5
    x[:, count // 2 :] *= 2
    return x


def test_lengths_are_what_scores_differ_by():
    k, first = keys(100), 6
    metric, difference = KeyMetric.of(k, first), torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    assert metric.factor.shape[1] == 1 + 3  # 6, 24 and 96 keys
    for at, count in enumerate((6, 24, 96), 1):
        of = k[:, :count].double()
        score = difference @ (of - of.mean(1, keepdim=True)).transpose(1, 2)
        found = (difference @ metric.factor[:, at].double()).square().sum(-1)
        variance = of.var(1, correction=0).mean(1, keepdim=True)
        # relative to the mean variance of the keys, and up to the ridge
        torch.testing.assert_close(found, score.square().mean(-1) / variance, rtol=1e-4, atol=1e-5)


def test_keys_that_span_few_directions_have_factors():
    g = torch.Generator().manual_seed(2)
    k = torch.randn(1, 4096, 3, generator=g) @ torch.randn(3, 32, generator=g)
    metric = KeyMetric.of(k, 256)
    for at, count in enumerate((256, 1024, 4096), 1):
        covariance = k[0, :count].T.double().cov(correction=0)
        found = metric.factor[0, at].double() @ metric.factor[0, at].double().T
        torch.testing.assert_close(found, covariance / covariance.diagonal().mean(), rtol=1e-4, atol=1e-5)


def test_a_tile_takes_the_last_covariance_of_keys_that_all_its_queries_see():
    metric = KeyMetric.of(keys(200), 6)
    known = torch.tensor([[0, 5, 6, 23, 24, 95, 96, 200]] * 2)
    assert metric.number(known)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_same_bits(metric.of_tiles(known)[1, 4], metric.factor[1, 2])
    # few keys have no covariance: queries are compared as they are
    assert_same_bits(metric.factor[:, 0], torch.eye(6).expand(2, -1, -1))
    assert KeyMetric.of(keys(5), 6).factor.shape == (2, 1, 6, 6)
    assert KeyMetric.of(keys(0), 6).factor.shape == (2, 1, 6, 6)


def test_later_keys_change_no_factor():
    k, other = keys(200), keys(200)
    other[:, 100:] = torch.nan
    ours, theirs = KeyMetric.of(k, 6), KeyMetric.of(other, 6)
    for at, count in enumerate((6, 24, 96), 1):
        assert count <= 100
        assert_same_bits(ours.factor[:, at], theirs.factor[:, at])


def test_products_summed_in_parts_are_those_of_all_keys(monkeypatch):
    k = keys(300)
    whole = KeyMetric.of(k, 10)
    monkeypatch.setattr(key_metric, "score_bytes", lambda device: 4 * 4 * 2 * 6 * 7)
    assert_exact(KeyMetric.of(k, 10).factor, whole.factor)


def test_keys_without_numbers_or_of_one_direction_have_a_factor():
    k = keys(64)
    k[0, 3] = torch.inf
    k[1] = 1.0
    factor = KeyMetric.of(k, 4).factor
    assert torch.isfinite(factor).all()


def test_directions_in_which_all_keys_are_alike_do_not_part_queries():
    """Queries differ most along a direction that no key has, and by less in one that tells keys apart."""
    size, dim = 32, 8
    given = problem(4 * size, heads=1, kv_heads=1, head_dim=dim)
    g = torch.Generator().manual_seed(2)
    q, k = torch.zeros_like(given.q), torch.zeros_like(given.k)
    side = torch.randint(0, 2, (4 * size,), generator=g).float() * 2 - 1
    for at in range(4):  # as many of each kind in a tile
        side[at * size : (at + 1) * size] = side[at * size : (at + 1) * size].argsort().argsort().ge(size // 2) * 2.0 - 1
    q[0, 0, :, 0], q[0, 0, :, 1] = side, 9 * torch.randn(4 * size, generator=g)
    k[0, 0, :, 0] = torch.randn(4 * size, generator=g)
    given = replace(given, q=q, k=k)
    tiles = cut(given, size)
    metric = KeyMetric.of(k[0], size).of_tiles(tiles.by_list(tiles.known))

    def mixed(alike) -> bool:
        return bool((alike.arrange(q)[:, 2:, :, 0].sum(2).abs() < size // 2).any())  # tiles that know a covariance

    assert not mixed(sort_alike(tiles, 2, metric=metric)[0])
    assert mixed(sort_alike(tiles, 2)[0])


def test_a_draw_compares_queries_by_keys(monkeypatch):
    """What `DrawAlike` lists changes with the metric: it is not left out on the way."""
    given = problem(600, heads=2, kv_heads=1, head_dim=20)
    method = ha.Method(ha.Sinks(4), ha.Window(32), DrawAlike(64, rows=32, pooled=4), tile=32)
    assert method.cost(600).share_of_exact < 1
    ours = method.attend(given).out
    monkeypatch.setattr(KeyMetric, "number", lambda self, known: torch.zeros_like(known))
    assert not torch.equal(method.attend(given).out, ours)
