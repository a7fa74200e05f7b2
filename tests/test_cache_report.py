"""The report on an audited cache: layers that differ, and what its interval covers."""

import pytest
import torch

from hyperattention.cache.audited import AuditedStore, are_drawn
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.cache_report import report_on
from hyperattention.cache.compressing import CompressingStore
from hyperattention.error.interval import mean_interval
from hyperattention.policies.uniform_sample import UniformSample
from test_audited_cache import ROOM, inputs, run


def test_a_layer_that_reads_every_key_errs_by_nothing() -> None:
    q, k, v = inputs(100)
    stores = {
        n: AuditedStore(CompressingStore(UniformSample(), room), 3, 0)
        for n, room in enumerate((ROOM, CacheBudget(500, 2, 8)))
    }
    for store in stores.values():
        run(store, q, k, v)
    alone, both = report_on({0: stores[0]}, 10**6), report_on(stores, 10**6)
    assert both.num_approximated == alone.num_approximated == 60
    assert both.num_audited == alone.num_audited == len(stores[0].audited)
    assert not stores[1].audited
    assert both.by_layer.tolist() == [pytest.approx(alone.relative_error), 0.0]
    assert both.relative_error == pytest.approx(alone.relative_error / 2)
    assert "worst: layer 0" in str(both)


def test_the_interval_covers_the_error_of_all_approximated_tokens() -> None:
    q, k, v = inputs(340)
    store = AuditedStore(CompressingStore(UniformSample(), ROOM), 1, 0)
    run(store, q, k, v)
    # heavy tails: a few tokens are wholly wrong
    errors = store.errors.mean(0)
    errors[::37] = 1.0
    position, truth, covered = torch.tensor(store.audited), errors.mean(), []
    for seed in range(200):
        drawn = errors[are_drawn(position, 10, seed)]
        assert len(drawn) == 30
        low, high = mean_interval(drawn[None, None], torch.ones(1, 30, dtype=torch.bool))
        covered.append(bool(low <= truth <= high))
    # strata only concentrate a sample: more than 95% may be covered
    assert sum(covered) / len(covered) >= 0.93
    assert float(high - low) < 0.5
