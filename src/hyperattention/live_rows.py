"""Split a problem with a key mask into problems without one: each batch row's live keys, as a slice if contiguous."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.fused import FusedCall
from hyperattention.problem import Problem, compact


@dataclass(frozen=True)
class LiveRows:
    """Consecutive batch rows, and the keys that they may see.

    Args:
        call: their queries and live keys, which need no key mask.
        shift: number of keys that the first query sees; each next query sees one more. None if every query sees all keys.
    """

    call: FusedCall
    shift: int | None


def live_rows(problem: Problem) -> tuple[LiveRows, ...] | None:
    """Cut a problem along its batch where masks differ, so that fused kernels need no mask and no key is copied.

    The values of the mask are read, which waits for the device. Keys are copied only if masked keys lie between live keys.

    Args:
        problem: the problem, with its keys in the order given or with live keys first.

    Returns:
        the batch rows in order, consecutive rows with equal masks together; None if no causal diagonal describes what rows
        see, or if the values of the mask cannot be read (in a graph, or on the meta device).
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
    """Return whether values may be read here: not during tracing or graph capture, and not from tensors without values."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _spans(rank: Tensor) -> list[tuple[int, int, bool]]:
    """Read for each batch row its first live position, its number of live keys, and whether they are contiguous, at once."""
    first, count = (rank == 0).sum(1), rank[:, -1]
    last = (first + count - 1).clamp(0, rank.shape[1] - 1)
    whole = rank.gather(1, last[:, None])[:, 0] == count
    return [(begin, num, bool(fit)) for begin, num, fit in torch.stack([first, count, whole.long()], 1).tolist()]


def _scattered(problem: Problem, spans: list[tuple[int, int, bool]]) -> tuple[LiveRows, ...] | None:
    """Move live keys to the front if they are not contiguous: each row then sees a number of leading keys."""
    if problem.causal and problem.num_queries != 1:
        return None
    if problem.rank is None and problem.key_mask is not None:
        k, v, rank = compact(problem.k, problem.v, problem.key_mask)
        problem = replace(problem, k=k, v=v, rank=rank, key_mask=None)
    counts = [num for _, num, _ in spans]
    if problem.causal:
        counts = problem.live_before(problem.position + 1)[:, 0].tolist()
    return tuple(_rows(problem, slice(row, row + 1), slice(0, num), None) for row, num in enumerate(counts))
