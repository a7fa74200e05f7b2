"""Evaluation of methods in a model: loss and retrieval, with the time and the measured error."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from hyperattention.bench.error import Error, pool
from hyperattention.bench.rows import Row
from hyperattention.bench.timing import Ratio, Timing, ignore, speedup
from hyperattention.methods.base import Cost
from hyperattention.methods.exact import Exact
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.passes import Pass, run_pass
from hyperattention.reference.samples import EvaluationSample

NUM_DEPTHS = 8
_TIMES = ("model_seconds", "attention_seconds")


@dataclass(frozen=True)
class Depth:
    """Retrieval of answers in a range of distances.

    Args:
        begin: smallest distance of the range.
        end: first distance after the range.
        share: share of correct digits; None if the range has no answers.
        answers: number of answers in the range.
    """

    begin: int
    end: int
    share: float | None
    answers: int


@dataclass(frozen=True)
class ModelJudgement:
    """The results of a model with one method in all its layers.

    Args:
        row: name of the row.
        label: label of the row, with a remark if exact attention ran.
        method: the method, as code.
        approximated: whether the method ran, and listed fewer pairs than exact attention.
        share_of_calls: share of attention calls that ran the method.
        bits_per_byte: loss on ordinary text of the second half.
        bits_with_planted: the same loss including the lines that set or ask for facts, whose answers have to be retrieved.
        added_nats: loss minus the loss with exact attention, in nats a byte, on the same documents.
        added_error: standard error of that difference over documents; None for a single document.
        retrieval: share of correct answer digits; None without questions.
        answers: number of answers.
        depths: retrieval by distance.
        cost: pairs listed, and dot products of the selection.
        error: measured error of the attention outputs; None if no call was approximated.
        model: seconds of each pass.
        attention: seconds in attention in each pass.
        model_ratio: speed of the model relative to exact attention.
        attention_ratio: speed of attention alone relative to exact attention.
        nats_per_byte: loss of each document.
    """

    row: str
    label: str
    method: str
    approximated: bool
    share_of_calls: float
    bits_per_byte: float
    bits_with_planted: float
    added_nats: float
    added_error: float | None
    retrieval: float | None
    answers: int
    depths: tuple[Depth, ...]
    cost: Cost
    error: Error | None
    model: Timing
    attention: Timing
    model_ratio: Ratio
    attention_ratio: Ratio
    nats_per_byte: tuple[float, ...]


def evaluate(
    loaded: LoadedModel,
    samples: Sequence[EvaluationSample],
    rows: Sequence[Row],
    *,
    seed: int = 0,
    audit_rows: int = 64,
    on_step: Callable[[str], None] = ignore,
) -> tuple[ModelJudgement, ...]:
    """Run every row on every sample, with the rows alternating, so that their times can be compared.

    Args:
        loaded: the model.
        samples: the texts.
        rows: the methods; the first must be exact attention, the reference for all.
        seed: seed of draws and audited rows; each sample has its own seed.
        audit_rows: rows of each approximated call that are compared with exact attention.
        on_step: called before each sample and row with their names.

    Returns:
        one judgement for each row.

    Raises:
        ValueError: if the first row is not exact attention, or there is no sample.
    """
    if not samples or not isinstance(rows[0].method, Exact):
        raise ValueError(
            f"{len(samples)} samples, first row {rows[0].name}: give at least one sample, and exact attention as first row"
        )
    beginning = samples[0].tokens[:64]
    nothing = torch.zeros(len(beginning) - 1, dtype=torch.bool, device="cpu")
    warm_up = EvaluationSample(beginning, nothing, 1, nothing)
    for row in rows:
        run_pass(loaded, warm_up, row)
    passes: dict[str, list[Pass]] = {row.name: [] for row in rows}
    for turn, sample in enumerate(samples):
        start = turn % len(rows)
        for row in (*rows[start:], *rows[:start]):
            on_step(f"{row.label}: document {turn + 1} of {len(samples)}")
            passes[row.name].append(run_pass(loaded, sample, row, seed=seed + turn, audit_rows=audit_rows))
    length = len(samples[0].tokens)
    return tuple(_judge(row, passes[row.name], passes[rows[0].name], length) for row in rows)


def _judge(row: Row, passes: Sequence[Pass], exact: Sequence[Pass], length: int) -> ModelJudgement:
    nats = sum(p.nats for p in passes) / sum(p.num_bytes for p in passes)
    whole = sum(p.num_bytes + p.num_planted for p in passes)
    added = [ours.nats_per_byte - theirs.nats_per_byte for ours, theirs in zip(passes, exact, strict=True)]
    digits = torch.cat([p.right.flatten() for p in passes])
    approximated = sum(p.approximated for p in passes)
    times = [(Timing(tuple(getattr(p, name) for p in group))) for name in _TIMES for group in (exact, passes)]
    return ModelJudgement(
        row=row.name,
        label=row.label_for(length, True, approximated),
        method=repr(row.method),
        approximated=row.approximates(length, True, approximated),
        share_of_calls=approximated / max(1, sum(p.calls for p in passes)),
        bits_per_byte=nats / math.log(2),
        bits_with_planted=sum(p.nats + p.planted_nats for p in passes) / whole / math.log(2),
        added_nats=statistics.fmean(added),
        added_error=statistics.stdev(added) / math.sqrt(len(added)) if len(added) > 1 else None,
        retrieval=float(digits.float().mean()) if len(digits) else None,
        answers=sum(len(p.right) for p in passes),
        depths=by_depth(passes, length),
        cost=row.cost(length, True),
        error=pool([report for p in passes for report in p.reports]),
        model=times[1],
        attention=times[3],
        model_ratio=speedup(times[0], times[1]),
        attention_ratio=speedup(times[2], times[3]),
        nats_per_byte=tuple(p.nats_per_byte for p in passes),
    )


def by_depth(passes: Sequence[Pass], length: int) -> tuple[Depth, ...]:
    """Group answers by their distance, in equal ranges.

    Args:
        passes: passes of one method.
        length: largest distance.

    Returns:
        retrieval in each range; empty without questions.
    """
    pairs = [pair for p in passes for pair in zip(p.distance, p.right.float().mean(-1).tolist(), strict=True)]
    if not pairs:
        return ()
    edges = [length * i // NUM_DEPTHS for i in range(NUM_DEPTHS + 1)]
    depths = []
    for begin, end in pairwise(edges):
        shares = [right for distance, right in pairs if begin <= distance < end]
        depths.append(Depth(begin, end, statistics.fmean(shares) if shares else None, len(shares)))
    return tuple(depths)
