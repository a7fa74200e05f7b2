"""A problem under a mask of keys as problems without one: each batch row's live keys, a slice where they are neighbours."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.fused import FusedCall
from hyperattention.problem import Problem, compact


@dataclass(frozen=True)
class LiveRows:
    """Some batch rows, and the keys that they may see.

    Args:
        call: their queries and live keys, which no mask concerns any more.
        shift: keys that the first query sees, each further one sees one more; None where every query sees all.
    """

    call: FusedCall
    shift: int | None


def live_rows(problem: Problem) -> tuple[LiveRows, ...] | None:
    """Cut a problem along its batch where masks differ, so that fused kernels need no mask and no key is copied.

    A mask's values are read, which waits for the device; keys are copied only where dead ones stand between live ones.

    Args:
        problem: the problem, its keys as they came or with live ones first.

    Returns:
        the batch rows in order, neighbours with equal masks together; None where rows see what no diagonal can say, and
        where a mask's values cannot be read: in a graph, or without any.
    """
    first = problem.offset + 1 if problem.causal else None
    if problem.causal and problem.spans is not None:
        return None
    if problem.rank is None and problem.key_mask is None:
        return (LiveRows(FusedCall(problem.q, problem.k, problem.v, problem.scale, problem.causal), first),)
    rank = problem.rank
    if rank is None and problem.key_mask is not None:
        rank = problem.key_mask.long().cumsum(1)
    if rank is None or not rank.numel() or not _readable(rank):
        return None
    spans = _spans(rank)
    if not all(whole for *_, whole in spans):
        return _scattered(problem, spans)
    taken: list[tuple[slice, slice, int | None]] = []
    for row, (begin, count, _) in enumerate(spans):
        start = begin if problem.rank is None else 0
        keys, shift = slice(start, start + count), None if first is None else first - begin
        if taken and taken[-1][1:] == (keys, shift):
            taken[-1] = (slice(taken[-1][0].start, row + 1), keys, shift)
        else:
            taken.append((slice(row, row + 1), keys, shift))
    return tuple(_rows(problem, *each) for each in taken)


def _rows(problem: Problem, batch: slice, keys: slice, shift: int | None) -> LiveRows:
    q, k, v = problem.q[batch], problem.k[batch, :, keys], problem.v[batch, :, keys]
    return LiveRows(FusedCall(q, k, v, problem.scale, problem.causal), shift)


def _readable(x: Tensor) -> bool:
    """Return whether values may be read here: not while tracing or capturing, nor from tensors without values."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _spans(rank: Tensor) -> list[tuple[int, int, bool]]:
    """Read for each batch row its first live position, its live keys, and whether they are neighbours: in one look."""
    first, count = (rank == 0).sum(1), rank[:, -1]
    last = (first + count - 1).clamp(0, rank.shape[1] - 1)
    whole = rank.gather(1, last[:, None])[:, 0] == count
    return [(begin, num, bool(fit)) for begin, num, fit in torch.stack([first, count, whole.long()], 1).tolist()]


def _scattered(problem: Problem, spans: list[tuple[int, int, bool]]) -> tuple[LiveRows, ...] | None:
    """Move live keys together where some stand apart: rows then see a number of leading keys."""
    if problem.causal and problem.num_queries != 1:
        return None
    if problem.rank is None and problem.key_mask is not None:
        k, v, rank = compact(problem.k, problem.v, problem.key_mask)
        problem = replace(problem, k=k, v=v, rank=rank, key_mask=None)
    counts = [num for _, num, _ in spans]
    if problem.causal:
        counts = problem.live_before(problem.position + 1)[:, 0].tolist()
    return tuple(_rows(problem, slice(row, row + 1), slice(0, num), None) for row, num in enumerate(counts))
