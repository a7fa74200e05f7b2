"""Score keys by averages of alike queries: blocks of keys first, of which the best are opened down to single keys.

An average's score counts relative to the sum of exponentials over all keys, which is that of closed blocks, as if the scores
inside were normal, and that of the keys in opened ones. No average scores all keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import log

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.select.score.block_sizes import OPENED
from hyperattention.select.score.groups import grouped
from hyperattention.select.score.key_blocks import KeyBlocks
from hyperattention.select.score.pooling import any_left
from hyperattention.select.score.scratch import Scratch
from hyperattention.tiling import Tiles

# deviations by which a query may exceed the average of its group
DEVIATIONS = 2.0
# blocks scored for each key scored at last, where blocks are opened more than once: what is closed early is lost
WIDER = 2
# logarithms below count as this: exponentials of less are slow, and add nothing
LEAST_LOG = -80.0
# averages of neighbouring tiles that score together: a CPU's second-level cache holds their scores
TOGETHER = 128


@dataclass(frozen=True)
class AlikeScan:
    """Averages of alike queries.

    Args:
        tiles: the problem tiled by position.
        query: averages of each group, ``[lists, tiles, many, groups, width]``.
        spread: squares of what the queries of a list differ by from the averages of their groups, beside half of the squares
            of the averages: what they leave out of their scores' variance, and how much that inside blocks counts.
        log_rows: half the logarithm of the queries in each group, relative to their mean number: the variance of a draw adds
            up over queries.
        begin: place of the first tile in `query`.
    """

    tiles: Tiles
    query: Float[Tensor, "lists tiles many groups width"]
    spread: Float[Tensor, "lists tiles many moments"]
    log_rows: Float[Tensor, "lists tiles many groups"]
    begin: int

    @classmethod
    def of(
        cls, tiles: Tiles, query: Float[Tensor, "lists tiles many rows width"],
        few: Float[Tensor, "lists tiles many rows directions"], groups: int, begin: int = 0,
    ) -> "AlikeScan":  # fmt: skip
        """Group the queries of each list, and average those of every group.

        Args:
            tiles: the problem tiled by position.
            query: queries of each list, scaled.
            few: the same in the directions by which they are grouped.
            groups: groups of each list.
            begin: place of the first tile in `query`; the others follow it.

        Returns:
            what scores are made of.
        """
        one_of = grouped(few.flatten(0, 2), groups)  # [sets, rows, groups]
        rows = one_of.sum(1)
        mean = (one_of / rows[:, None].clamp(min=1)).transpose(1, 2) @ query.flatten(0, 2)
        apart = (query.flatten(0, 2) - one_of @ mean).square().mean(1)
        spread = torch.cat([apart, mean.square().mean(1) * 0.5], 1)
        log_rows = (rows / rows.mean(1, keepdim=True)).clamp(min=torch.finfo(rows.dtype).tiny).log() * 0.5
        mean, spread, log_rows = (x.unflatten(0, query.shape[:3]) for x in (mean, spread, log_rows))
        return cls(tiles, mean, spread, log_rows, begin)

    def shares(
        self, part: slice, blocks: Mapping[int, KeyBlocks], left: tuple[Tensor, ...], size: int, count: int
    ) -> tuple[Int[Tensor, "lists chunk some"], Float[Tensor, "lists chunk many some"]]:
        """Find the keys of the largest shares, and estimate the largest share that a query of each list gives each.

        Args:
            part: the tiles.
            blocks: all keys, in blocks of one key, of `OPENED` and so on up to `size`.
            left: what earlier stages left, from `edges`, for each of these tiles.
            size: keys in the blocks that are scored first; where it is one all keys are found.
            count: keys scored by all averages at last, where it is more.

        Returns:
            numbers of keys, ascending, behind them the number of all keys where a tile has fewer; and their shares, 0 where
            earlier stages took a key.
        """
        tiles, keys = self.tiles, blocks[1].mean.shape[1]
        known, query = tiles.by_list(tiles.known)[:, part], self.query[:, self.own(part)]
        room = max(1, self._most_known(part)) if size == 1 else room_of(count)
        index = torch.full((*known.shape, room), keys, dtype=torch.int64, device=known.device)
        share = query.new_zeros(*query.shape[:3], room)
        rooms = [Scratch(query, 0) for _ in range(4)]
        for one, (some, most) in product(range(len(known)), self._together(part)):
            of_tiles = TileScan.of(self, one, slice(part.start + some.start, part.start + some.stop), rooms)
            seen = most, known[one, some, None]
            found = of_tiles.opened(blocks, one, tuple(x[one, some] for x in left), seen, size, count)
            width = min(found[0].shape[1], room)
            index[one, some, :width], share[one, some, :, :width] = (x[..., :width] for x in found)
        return index, share

    def _together(self, part: slice) -> list[tuple[slice, int]]:
        """Cut tiles into those that are scored together.

        Args:
            part: the tiles.

        Returns:
            where they stand in the part, and a bound of the keys that they see. Both depend on the numbers of tiles alone:
            a tile's scores have the same bits in every chunk, and however many tiles follow.
        """
        tiles, problem, found = self.tiles, self.tiles.problem, []
        step = max(1, TOGETHER // self.query.shape[2:4].numel())
        for number, places in groupby(range(part.start, part.stop), lambda place: tiles.number(place) // step):
            begin, last = min(of := list(places)), max(of)
            until = max(1, ((number + 1) * step - 1) * tiles.size)
            found.append((slice(begin - part.start, last + 1 - part.start), until if problem.causal else problem.num_keys))
        return found

    def own(self, part: slice) -> slice:
        """Tell where tiles stand in `query`."""
        return slice(part.start - self.begin, part.stop - self.begin)

    def _most_known(self, part: slice) -> int:
        """Bound the keys that all queries of a tile see, by position alone, which needs no look at the device."""
        problem = self.tiles.problem
        if not problem.causal:
            return problem.num_keys
        return max(0, min(self.tiles.number(part.stop - 1) * self.tiles.size, problem.num_keys))


@dataclass(frozen=True)
class TileScan:
    """Averages of the lists of some tiles, which score the keys of one list.

    Args:
        query: averages of each group.
        apart: squares of what queries differ by from the averages of their groups.
        half: half of the squares of the averages, averaged over all of a tile: by squares of its own a sharp list would take
            blocks from the others.
        log_rows: half the logarithm of the queries in each group.
        rooms: memory for scores, and for means of opened blocks, variances and squares.
    """

    query: Float[Tensor, "tiles averages width"]
    apart: Float[Tensor, "tiles many width"]
    half: Float[Tensor, "tiles 1 width"]
    log_rows: Float[Tensor, "tiles many groups"]
    rooms: Sequence[Scratch]

    @classmethod
    def of(cls, scan: AlikeScan, one: int, part: slice, rooms: Sequence[Scratch]) -> "TileScan":
        """Take the averages of some tiles, of one list of keys."""
        query, spread, log_rows = (x[one, scan.own(part)] for x in (scan.query, scan.spread, scan.log_rows))
        apart, half = spread.chunk(2, 2)
        return cls(query.flatten(1, 2), apart * DEVIATIONS**2, half.mean(1, keepdim=True), log_rows, rooms)

    def opened(
        self, blocks: Mapping[int, KeyBlocks], one: int, left: tuple[Tensor, ...], seen: tuple[int, Tensor], size: int,
        count: int,
    ) -> tuple[Int[Tensor, "tiles some"], Float[Tensor, "tiles many some"]]:  # fmt: skip
        """Open the blocks of the largest shares, and of these again, down to keys: see `AlikeScan.shares`.

        Args:
            blocks: keys by size of blocks.
            one: number of the list of keys.
            left: what earlier stages left of it.
            seen: keys that the queries of a tile all see, at most, and of each tile.
            size: keys in the first blocks.
            count: keys opened at last.

        Returns:
            the keys and their shares.
        """
        most, known = seen
        number, inside = (torch.arange(x, dtype=torch.int64, device=self.query.device) for x in (most // size, OPENED))
        some = blocks[size].first(one, most // size)
        closed = self.query.new_full(self.log_rows.shape, -torch.inf)
        while True:
            hidden = number >= known // size
            number = number.masked_fill(hidden, blocks[1].mean.shape[1])
            weight, beside = self._masses(some, hidden)
            # nothing known: any finite number will do
            top = weight.amax(3).clamp_(min=torch.finfo(weight.dtype).min)
            weight.sub_(top[..., None]).clamp_(min=LEAST_LOG).exp_()
            bar = _added(closed, top + weight.sum(3).log_()) - self.log_rows
            weight.mul_((top - bar).exp_()[..., None])
            # as far as the average of a group tells, and as far as its queries may exceed it
            log_share = weight.amax(2).log_().add_(beside)
            if size == 1:
                break
            wanted = min(-(-(count if size == OPENED else WIDER * count) // OPENED), number.shape[1])
            # what earlier stages took is opened before what is not there
            rank = log_share.amax(1).masked_fill_(~any_left(number * size, size, left), torch.finfo(weight.dtype).min)
            best = rank.masked_fill_(hidden, -torch.inf).topk(wanted, sorted=False).indices
            keep = torch.ones_like(rank).scatter_(1, best, 0.0)
            closed = _added(closed, bar + weight.mul_(keep[:, None, None]).sum(3).log_())
            # the one behind the last whole block has whole smaller ones
            opened, size = torch.cat([number.gather(1, best), known // size], 1).sort().values, size // OPENED
            number = (opened[..., None] * OPENED + inside).flatten(1)
            some = blocks[size].of(one, number.clamp(max=blocks[size].mean.shape[1] - 1), self.rooms[1:])
        return number, log_share.clamp_(max=0.0).exp_().masked_fill_(~any_left(number, 1, left)[:, None], 0.0)

    def _masses(
        self, some: KeyBlocks, hidden: Bool[Tensor, "tiles some"]
    ) -> tuple[Float[Tensor, "tiles many groups some"], Float[Tensor, "tiles many some"]]:
        """Estimate what blocks add to sums of exponentials, and what is added to that for the largest share of a key."""
        mass, log_value = self._products(some.mean), some.log_value[:, None]
        # numbers ascend: none is hidden before the first that is
        first = int((~hidden).sum(1).min()) if hidden.device.type == "cpu" else 0
        if some.variance is None:
            mass[..., first:].masked_fill_(hidden[:, None, first:], -torch.inf)
        else:
            half, log_size = self.half @ some.variance.transpose(1, 2), log(some.size)
            # n normal scores of deviation s sum up to n exp(s^2 / 2) while s < sqrt(2 log n); beyond, the largest few make
            # the sum: exp(s sqrt(2 log n)) (Derrida, 1981, the random energy model); it would overshoot without bound
            in_sum = torch.where(half <= log_size, half + log_size, 2 * (half * log_size).sqrt())
            mass += in_sum.masked_fill(hidden[:, None], -torch.inf)
            # a key that stands out counts for more than the sum that it is in
            log_value = log_value + (half - in_sum)
        square = some.square
        if square is None:
            square = torch.square(some.mean, out=self.rooms[3].take(*some.mean.shape))
        beside = (self.apart @ square.transpose(1, 2)).sqrt_()
        return mass.unflatten(1, self.log_rows.shape[1:]), beside.add_(log_value)

    def _products(self, mean: Float[Tensor, "some blocks width"]) -> Float[Tensor, "tiles averages blocks"]:
        """Multiply averages by blocks of their tile, or by those that all tiles share."""
        out = self.rooms[0].take(*self.query.shape[:2], mean.shape[1])
        if len(mean) > 1 or len(self.query) == 1:
            return torch.bmm(self.query, mean.transpose(1, 2), out=out)
        torch.mm(self.query.flatten(0, 1), mean[0].T, out=out.flatten(0, 1))
        return out


def room_of(count: int) -> int:
    """Count the keys that may be scored at last: those of opened blocks and of the one behind the last whole block."""
    return (-(-count // OPENED) + 1) * OPENED


def _added(one: Tensor, other: Tensor) -> Tensor:
    """Add up two sums of exponentials: `torch.logaddexp` on a CPU rounds a number by its place."""
    return torch.stack([one, other]).logsumexp(0)
