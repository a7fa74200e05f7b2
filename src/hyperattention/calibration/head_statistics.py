"""Attention statistics of the heads of one layer, and the error of a method: the figures of the command `inspect`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention.calibration.measure import Measurement, measure_layer, run_on
from hyperattention.error.audit import audit, sample_rows
from hyperattention.error.row_statistics import light_weight
from hyperattention.error.sampled_rows import hide_later
from hyperattention.exact import grouped_scores
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead
from hyperattention.reference.call_recorder import CallInputs

SINKS, WINDOW = 16, 256


@dataclass(frozen=True)
class LayerFigures:
    """The figures of one layer by query head, and the method of each kv head.

    Args:
        layer: the index of the layer.
        figures: by name, one number for each query head: ``entropy`` of rows in nats; ``sinks``, ``window`` and ``far``, the
            shares of attention weight on these keys; ``alpha`` and ``kappa``; ``error`` of the method, with its interval
            from ``low`` to ``high``.
        methods: the method of each kv head.
        ladder: the measured candidates, exact attention first; every method of a head is included.
        measured: errors and times of the candidates, and last those of the layer with `methods`.
        num_keys: number of keys.
    """

    layer: int
    figures: dict[str, list[float]]
    methods: tuple[AttentionMethod, ...]
    ladder: tuple[AttentionMethod, ...]
    measured: Measurement
    num_keys: int

    @property
    def group(self) -> int:
        """The number of query heads that share a kv head."""
        return len(self.figures["error"]) // len(self.methods)

    @property
    def shares(self) -> list[float]:
        """For each query head, the number of listed pairs relative to exact attention."""
        shares = [method.cost(self.num_keys).share_of_exact for method in self.methods]
        return [share for share in shares for _ in range(self.group)]

    @property
    def time_ms(self) -> list[float]:
        """For each query head, the milliseconds of a call in which its method runs all heads, divided by their number."""
        heads = len(self.figures["error"])
        each = [1000 * self.measured.seconds[self.ladder.index(method)] / heads for method in self.methods]
        return [time for time in each for _ in range(self.group)]


@torch.no_grad()
def inspect_layer(
    call: CallInputs, served: ByHead, ladder: Sequence[AttentionMethod], *, rows: int = 256, seed: int = 0
) -> LayerFigures:
    """Measure all figures of one layer.

    Args:
        call: the queries, keys and values of the layer.
        served: the method of each kv head.
        ladder: further candidates to measure, exact attention first.
        rows: number of rows sampled for each head.
        seed: seed of draws and rows.

    Returns:
        the figures.
    """
    tried = tuple(dict.fromkeys((*ladder, *served.methods)))
    shared = call.q.shape[1] != call.k.shape[1]
    report = audit(
        call.q,
        call.k,
        call.v,
        run_on(call, served, seed),
        rows=rows,
        is_causal=True,
        scale=call.scale,
        enable_gqa=shared,
        seed=seed,
        heavy=(SINKS, WINDOW),
    )
    found = {"alpha": report.alpha, "kappa": report.kappa, "error": report.relative_error}
    found |= dict(zip(("low", "high"), report.interval, strict=True))
    figures = {name: figure[0].tolist() for name, figure in found.items()} | _row_figures(call, rows, seed)
    measured = measure_layer(call, (*tried, served), 0, seed)
    return LayerFigures(call.layer, figures, served.methods, tried, measured, call.k.shape[2])


def _row_figures(call: CallInputs, rows: int, seed: int) -> dict[str, list[float]]:
    """Average the entropy and the shares of attention weight over the rows that an audit with the same seed draws."""
    index = sample_rows(call.q.shape[2], rows, seed, call.q.device)
    counts = [int(row) + 1 for row in index]
    windows = [(count - WINDOW, count) for count in counts]
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    group = call.q.shape[1] // call.k.shape[1]
    figures: dict[str, list[float]] = {name: [] for name in ("entropy", "sinks", "window", "far")}
    for head in range(call.q.shape[1]):
        # one head at a time, because its rows may be long
        query = call.q[:, head : head + 1, index].float()[:, :, None]
        key = call.k[:, head // group : head // group + 1].float()
        scores = grouped_scores(query, key, scale)
        hide_later(scores, counts)
        weights = torch.softmax(scores, -1)
        far = light_weight(weights, SINKS, windows)
        sinks = weights[..., :SINKS].sum(-1)
        entropy = -torch.special.xlogy(weights, weights).sum(-1)
        for name, figure in (("entropy", entropy), ("sinks", sinks), ("far", far), ("window", 1 - sinks - far)):
            figures[name].append(_mean(figure))
    return figures


def _mean(figure: Tensor) -> float:
    return float(figure.mean().clamp(min=0))
