"""Summary of replies and losses, by candidate, task, length and depth."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hyperattention.evaluation.ask import Reply
from hyperattention.evaluation.continuation import AddedLoss, Loss, added
from hyperattention.evaluation.policies import CacheCandidate
from hyperattention.evaluation.score import Mark, Share, marks

# if exact attention finds a smaller share of answers, the task is too hard for the model and does not measure the cache
FLOOR = 0.5
# task, length, whether the question was visible, range of depths
_Where = tuple[str, int, bool, int | None]


@dataclass(frozen=True)
class Cell:
    """The share of answers found, for one candidate, task, length and range of depths.

    Args:
        candidate: the candidate whose cache was used.
        task: name of the task.
        length: largest number of tokens of an item.
        visible: whether the question was part of the text when the cache was compressed.
        depth: number of the range of depths; None for all ranges together.
        share: share of answers found.
        digits: mean share of characters at the correct place.
        ceiling: share of answers found with exact attention.
        memory_bytes: mean bytes of the cache of an item.
        seconds: mean time of one token, divided by the rows of the batch.
        approximated: number of attention calls that read a compressed cache.
    """

    candidate: CacheCandidate
    task: str
    length: int
    visible: bool
    depth: int | None
    share: Share
    digits: float
    ceiling: Share
    memory_bytes: float
    seconds: float
    approximated: int

    @property
    def beyond(self) -> bool:
        """Whether the task is too hard for the model here."""
        return self.ceiling.value < FLOOR

    @property
    def exact(self) -> bool:
        """Whether nothing was approximated."""
        return self.approximated == 0


@dataclass(frozen=True)
class Continuation:
    """The added loss on the continuation of texts, for one candidate and length.

    Args:
        candidate: the candidate whose cache was used.
        length: tokens of a text.
        added: the added loss.
        memory_bytes: mean bytes of the cache of a text.
        approximated: number of attention calls that read a compressed cache.
    """

    candidate: CacheCandidate
    length: int
    added: AddedLoss
    memory_bytes: float
    approximated: int

    @property
    def exact(self) -> bool:
        """Whether nothing was approximated."""
        return self.approximated == 0


def range_of(depth: float, depths: int) -> int:
    """Return the range that contains a depth.

    Args:
        depth: the depth, from 0 to 1.
        depths: number of ranges.

    Returns:
        the number of the range.
    """
    return min(depths - 1, int(depth * depths))


def cells(replies: Iterable[Reply], depths: int) -> tuple[Cell, ...]:
    """Group answers by candidate, task, length, visibility and depth.

    Args:
        replies: the replies of all candidates, including exact attention.
        depths: number of ranges of depth.

    Returns:
        a cell for each range, and one over all ranges.
    """
    found: dict[tuple[CacheCandidate, _Where], list[tuple[Reply, Mark]]] = {}
    for reply in replies:
        for mark in marks(reply.item, reply.outputs):
            for depth in (None, range_of(mark.depth, depths)):
                where = reply.item.task, reply.item.length, reply.visible, depth
                found.setdefault((reply.candidate, where), []).append((reply, mark))
    ceilings = {where: _share(group) for (who, where), group in found.items() if who.family.policy is None}
    return tuple(
        Cell(
            who,
            *where,
            _share(group),
            statistics.fmean(mark.digits for _, mark in group),
            ceilings[where],
            statistics.fmean(reply.memory_bytes for reply, _ in group),
            statistics.fmean(reply.seconds for reply, _ in group),
            sum(reply.approximated for reply, _ in group),
        )
        for (who, where), group in found.items()
    )


def _share(group: Sequence[tuple[Reply, Mark]]) -> Share:
    return Share(sum(mark.right for _, mark in group), len(group))


def continuations(losses: Sequence[tuple[int, Loss]]) -> tuple[Continuation, ...]:
    """Pool losses by candidate and length.

    Args:
        losses: the losses, each with the length of its text.

    Returns:
        one for each candidate and length.
    """
    found: dict[tuple[CacheCandidate, int], list[Loss]] = {}
    for length, loss in losses:
        found.setdefault((loss.candidate, length), []).append(loss)
    return tuple(
        Continuation(
            who,
            length,
            added(group),
            statistics.fmean(each.memory_bytes for each in group),
            sum(each.approximated for each in group),
        )
        for (who, length), group in found.items()
    )
