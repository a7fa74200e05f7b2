"""One step of the engine: its rows by how they are computed, and the computation of the approximated ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperattention import measured_paged_attention, paged_attention
from hyperattention.error.judge import relative_error
from hyperattention.integrations.vllm.counts import pairs_of
from hyperattention.integrations.vllm.decoding import DecodedRow, attend_to_best_pages
from hyperattention.integrations.vllm.metrics import ServedMetrics
from hyperattention.integrations.vllm.options import Options
from hyperattention.integrations.vllm.page_summaries import PageSummaries
from hyperattention.integrations.vllm.pages import CachePages
from hyperattention.integrations.vllm.split import Split
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact


@dataclass(frozen=True)
class ServedLayer:
    """A layer that may be approximated.

    Args:
        number: its index in the model.
        method: the method of its prompts; None if they are exact.
        summaries: the side table of its pages; None if it decodes exactly.
    """

    number: int
    method: AttentionMethod | None
    summaries: PageSummaries | None

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether its prompts, and whether its requests that generate may be approximated."""
        return self.method is not None, self.summaries is not None


NOT_SERVED = ServedLayer(0, None, None)


@dataclass(frozen=True)
class ExactRows:
    """The rows of a step that vLLM computes in one kind of layers.

    Args:
        metadata: metadata of vLLM's own backend for them; None if there are none.
        rows: the rows, in order; None for all rows.
    """

    metadata: Any
    rows: Tensor | None


@dataclass(frozen=True)
class Step:
    """What a step's layers share.

    Args:
        exact: the rows that vLLM computes, by the kind of a layer.
        split: all rows of a layer whose prompts and decoding may be approximated.
        decoded: the requests that generate and read their best pages.
        filled: the pages that this step fills; None if no layer reads their summaries.
        table: pages of every request.
        layers: each layer that may be approximated, by name.
        first_kv_head: number of the first kv head of this process.
        short: the reason why prompts before `min_length` are exact.
        pages: how the cache holds keys.
        options: the options of the server.
        metrics: the metrics of this process.
    """

    exact: Mapping[tuple[bool, bool], ExactRows]
    split: Split
    decoded: tuple[DecodedRow, ...]
    filled: Tensor | None
    table: Tensor
    layers: dict[str, ServedLayer]
    first_kv_head: int
    short: str
    pages: CachePages | None
    options: Options
    metrics: ServedMetrics

    def count(self, layer: ServedLayer, windowed: bool) -> None:
        """Count the exact calls of a layer.

        Args:
            layer: the layer.
            windowed: whether it has a sliding window.
        """
        others = len(self.decoded) if layer.summaries is None else 0
        self.metrics.exactly("decoding", self.split.decoding + others)
        self.metrics.exactly(self.short, self.split.short)
        if layer.method is None:
            self.metrics.exactly("sliding window" if windowed else "layer not listed", len(self.split.approximate))


def attend(
    step: Step, number: int, method: AttentionMethod, query: Tensor, cache: Tensor, output: Tensor, scale: float
) -> None:
    """Compute the approximated rows of prompts of a layer, and write them.

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
    for piece in step.split.approximate:
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
        listed, exact = pairs_of(method, piece, query.shape[2])
        audited = step.metrics.approximate((listed * query.shape[1], exact * query.shape[1]), step.options)
        if audited:
            result = measured_paged_attention(*arguments, **options, audit=step.options.audit_rows)
            out, report = result.out, result.audit[0]
            assert report is not None  # a piece has queries
            step.metrics.audit(float(report.relative_error.double().mean()))
        else:
            out = paged_attention(*arguments, **options)
        output[rows] = out


def decode(step: Step, summaries: PageSummaries, query: Tensor, cache: Tensor, output: Tensor, scale: float) -> None:
    """Compute the requests that generate over their best pages in a layer, and write them.

    Args:
        step: the step.
        summaries: the side table of the layer.
        query: queries of all rows, ``[tokens, heads, head_dim]``.
        cache: the cache of the layer.
        output: where the rows go, ``[tokens, heads, head_dim]``.
        scale: factor of the scores.
    """
    assert step.pages is not None  # there is a side table
    for row in step.decoded:
        first = row.piece.first
        out = attend_to_best_pages(query[first], step.pages, cache, summaries, row, scale)
        heads, keys = query.shape[1], row.piece.keys
        if step.metrics.approximate((row.plan.slots * heads, keys * heads), step.options, decoding=True):
            starts, lengths = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in ([0, 1], [keys]))
            held = step.pages.of_request(cache, step.table[row.piece.request], keys)
            exact = paged_attention(query[first : first + 1], *held, starts, lengths, scale=scale, method=Exact())[0]
            error = relative_error(out.double() - exact.double(), exact.double())
            step.metrics.audit(float(error.mean()), decoding=True)
        output[first] = out
