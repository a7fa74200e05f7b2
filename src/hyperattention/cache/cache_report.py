"""What the audit of a cache found, as a value that prints in one line."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.cache.audited import AuditedStore
from hyperattention.interval import mean_interval


@dataclass(frozen=True)
class CacheReport:
    """The measured error of attention through a compressed cache, with its interval: over all layers, and a layer at a time.

    A token's error is the mean over the heads of ||out - exact|| / ||exact||. Tokens are drawn at random, one from each of
    equal runs; the intervals speak of all approximated tokens of this text, not of other texts or other draws of the policy.

    Args:
        relative_error: mean over the tokens audited, all layers together; NaN if none was.
        interval: low and high end of its 95% interval.
        by_layer: the same, a layer at a time.
        interval_by_layer: likewise.
        layers: numbers of the layers.
        num_audited: tokens audited.
        num_approximated: tokens whose attention did not read every key.
        num_tokens: tokens read and written.
        memory_bytes: held by the cache.
        shadow_bytes: held beside it for the audit alone.
    """

    relative_error: float
    interval: tuple[float, float]
    by_layer: Float[Tensor, " layers"]
    interval_by_layer: tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]
    layers: tuple[int, ...]
    num_audited: int
    num_approximated: int
    num_tokens: int
    memory_bytes: int
    shadow_bytes: int

    def __str__(self) -> str:
        """Say in one line what was measured, on average and for the worst layer."""
        if not self.num_approximated:
            return f"exact: none of {self.num_tokens:,} tokens was approximated"
        if not self.num_audited:
            return f"not measured: none of {self.num_approximated:,} approximated tokens was drawn; give a smaller audit="
        worst = int(self.by_layer.argmax())
        low, high = (float(end[worst]) for end in self.interval_by_layer)
        return (
            f"relative error {_span(self.relative_error, *self.interval)}, {self.num_audited:,} of "
            f"{self.num_approximated:,} approximated tokens audited; worst: layer {self.layers[worst]}, "
            f"{_span(float(self.by_layer[worst]), low, high)}; {self.shadow_bytes / 2**20:.1f} MiB held for the audit alone"
        )


def _span(middle: float, low: float, high: float) -> str:
    return f"{middle:.2g} (95% CI {low:.2g}-{high:.2g})"


def report_on(stores: Mapping[int, AuditedStore]) -> CacheReport:
    """Sum up what the audits of all layers found.

    Args:
        stores: the audited store of each layer, by its number; at least one.

    Returns:
        the report.
    """
    every = list(stores.values())
    # a layer may read every key where another does not: only tokens that all of them judged say something of the whole
    common = sorted(set.intersection(*(set(store.audited) for store in every)))
    num_approximated = max(store.num_approximated for store in every)
    columns = [
        store.errors.mean(0)[[store.audited.index(at) for at in common]] if common else torch.empty(0) for store in every
    ]
    by_token = torch.stack(columns).double()  # [layers, audited]
    whole = torch.cat([by_token.mean(0, keepdim=True), by_token])
    mean = whole.mean(1) if common else torch.full((len(whole),), torch.nan)
    low, high = mean, mean
    if common and len(common) < num_approximated:
        low, high = (end[0] for end in mean_interval(whole[None], torch.ones(1, len(common), dtype=torch.bool)))
    return CacheReport(
        float(mean[0]), (float(low[0]), float(high[0])), mean[1:], (low[1:], high[1:]), tuple(stores),
        len(common), num_approximated, max(store.seen for store in every),
        sum(store.memory_bytes for store in every), sum(store.shadow_bytes for store in every),
    )  # fmt: skip
