"""One step of the engine: its rows by how they are computed, and the computation of the approximated ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperattention import measured_paged_attention, paged_attention
from hyperattention.integrations.vllm.counts import pairs_of
from hyperattention.integrations.vllm.metrics import ServedMetrics
from hyperattention.integrations.vllm.options import Options
from hyperattention.integrations.vllm.pages import CachePages
from hyperattention.integrations.vllm.split import Piece, Split
from hyperattention.methods.base import AttentionMethod


@dataclass(frozen=True)
class Step:
    """What a step's layers share.

    Args:
        whole: metadata of vLLM's own backend for all rows.
        rest: the same for the exact rows alone; None if there are none.
        rest_rows: the exact rows, in order.
        pieces: the approximated rows.
        table: pages of every request.
        layers: index and method of each layer that may be approximated, by name.
        first_kv_head: number of the first kv head of this process.
        split: all rows, for the counts.
        pages: how the cache holds keys.
        options: the options of the server.
        metrics: the metrics of this process.
    """

    whole: Any
    rest: Any
    rest_rows: Tensor
    pieces: tuple[Piece, ...]
    table: Tensor
    layers: dict[str, tuple[int, AttentionMethod]]
    first_kv_head: int
    split: Split
    pages: CachePages | None
    options: Options
    metrics: ServedMetrics

    def count(self, listed: bool, windowed: bool) -> None:
        """Count the exact calls of a layer.

        Args:
            listed: whether the layer may be approximated.
            windowed: whether the layer has a sliding window.
        """
        self.metrics.exactly("decoding", self.split.decoding)
        self.metrics.exactly("below min_length", self.split.short)
        if not listed:
            self.metrics.exactly("sliding window" if windowed else "layer not listed", len(self.pieces))


def attend(
    step: Step, number: int, method: AttentionMethod, query: Tensor, cache: Tensor, output: Tensor, scale: float
) -> None:
    """Compute the approximated rows of a layer, and write them.

    Args:
        step: the step.
        number: index of the layer.
        method: its method.
        query: queries of all rows, ``[tokens, heads, head_dim]``.
        cache: the cache of the layer.
        output: where the rows go, ``[tokens, heads, head_dim]``.
        scale: factor of the scores.
    """
    assert step.pages is not None  # there are pieces
    for piece in step.pieces:
        rows = slice(piece.first, piece.first + piece.count)
        key, value, table = step.pages.of_request(cache, step.table[piece.request], piece.keys)
        starts, lengths = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in ([0, piece.count], [piece.keys]))
        options: dict[str, Any] = {
            "scale": scale,
            "method": method,
            "seed": step.options.seed,
            "layer": number,
            "first_kv_head": step.first_kv_head,
        }
        arguments = (query[rows], key, value, table, starts, lengths)
        every, metrics = step.options.audit_every, step.metrics
        listed, exact = pairs_of(method, piece, query.shape[2])
        metrics.approximate((listed * query.shape[1], exact * query.shape[1]))
        if every and metrics.counts.approximated % every == 0:
            result = measured_paged_attention(*arguments, **options, audit=step.options.audit_rows)
            out, report = result.out, result.audit[0]
            assert report is not None  # a piece has queries
            metrics.audit(float(report.relative_error.double().mean()))
        else:
            out = paged_attention(*arguments, **options)
        output[rows] = out
