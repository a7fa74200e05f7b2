"""The report of a cache audit: a value that prints in one line."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.cache.audited import AuditedStore
from hyperattention.error.interval import format_lack, format_mean, mean_interval


@dataclass(frozen=True)
class CacheReport:
    """The measured error of attention over a compressed cache, with its interval: over all layers, and for each layer.

    A token's error is the mean over layers and heads of ||out - exact|| / ||exact||, where exact is attention of the same
    query over every key that this cache was given; a layer that read all keys has error 0. Tokens are drawn at random, one
    from each of equal runs. The intervals hold for all approximate tokens of this text, not for other texts or other draws
    of the policy. They assume that no token has an error above 1, or above the largest drawn error if that exceeds 1. Each
    interval holds separately at 95%: of many layers, the largest measured error is likely an overestimate.

    Args:
        relative_error: mean over the audited tokens, all layers together; NaN if no token was audited.
        interval: low and high end of its 95% interval.
        by_layer: mean relative error of each layer.
        interval_by_layer: interval of each layer.
        layers: indices of the layers.
        num_audited: number of audited tokens.
        num_approximated: number of tokens for which the cache of at least one layer did not read every key. Approximate
            attention over a complete cache, such as that of a prompt, does not count: its own audit measures it.
        num_tokens: number of tokens read and written.
        num_read: slots per head that the next step reads.
        memory_bytes: bytes held by the cache.
        whole_bytes: bytes of all keys and values.
        shadow_bytes: bytes held additionally for the audit alone.
    """

    relative_error: float
    interval: tuple[float, float]
    by_layer: Float[Tensor, " layers"]
    interval_by_layer: tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]
    layers: tuple[int, ...]
    num_audited: int
    num_approximated: int
    num_tokens: int
    num_read: int
    memory_bytes: int
    whole_bytes: int
    shadow_bytes: int

    def __str__(self) -> str:
        """Print in one line the measured error, on average and for the worst layer."""
        if not self.num_approximated:
            return f"nothing to measure: the cache read every key for all {self.num_tokens:,} tokens"
        if not self.num_audited:
            return f"not measured: none of {self.num_approximated:,} approximated tokens was drawn; give a smaller audit="
        worst = int(self.by_layer.argmax())
        low, high = (float(end[worst]) for end in self.interval_by_layer)
        return (
            f"relative error {format_mean(self.relative_error, *self.interval, self.num_audited)}, {self.num_audited:,} of "
            f"{self.num_approximated:,} approximated tokens audited{format_lack(*self.interval, self.num_audited)}; "
            f"worst: layer {self.layers[worst]}, {format_mean(float(self.by_layer[worst]), low, high, self.num_audited)}; "
            f"{self._kept()}; {_mebibytes(self.shadow_bytes)} held for the audit alone"
        )

    def _kept(self) -> str:
        whole = f"{self.memory_bytes / self.whole_bytes:.1%} of {_mebibytes(self.whole_bytes)} held"
        return f"{whole}, {self.num_read / self.num_tokens:.1%} of {self.num_tokens:,} keys read a step"


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.3g} MiB"


def report_on(stores: Mapping[int, AuditedStore], whole_bytes: int) -> CacheReport:
    """Summarise the audits of all layers.

    Args:
        stores: the audited store of each layer, by the index of the layer; at least one.
        whole_bytes: bytes of all keys and values of these layers.

    Returns:
        the report.
    """
    every = list(stores.values())
    found = [dict(zip(store.audited, store.errors.mean(0).tolist(), strict=True)) for store in every]
    positions = sorted(set().union(*found))
    # all layers draw the same positions: a layer without an error there had read every key
    by_token = torch.tensor(
        [[errors.get(at, 0.0) for at in positions] for errors in found], dtype=torch.float64, device="cpu"
    )
    num_audited, num_approximated = len(positions), int(torch.stack([store.approximated for store in every]).any(0).sum())
    whole = torch.cat([by_token.mean(0, keepdim=True), by_token])  # [layers and one more, audited]
    mean = low = high = whole.mean(1)
    if 0 < num_audited < num_approximated:
        low, high = (
            end[0] for end in mean_interval(whole[None], torch.ones(1, num_audited, dtype=torch.bool, device="cpu"))
        )
    num_tokens = max(store.seen for store in every)
    return CacheReport(
        relative_error=float(mean[0]),
        interval=(float(low[0]), float(high[0])),
        by_layer=mean[1:],
        interval_by_layer=(low[1:], high[1:]),
        layers=tuple(stores),
        num_audited=num_audited,
        num_approximated=num_approximated,
        num_tokens=num_tokens,
        num_read=max(store.num_read for store in every),
        memory_bytes=sum(store.memory_bytes for store in every),
        whole_bytes=whole_bytes,
        shadow_bytes=sum(store.shadow_bytes for store in every),
    )
