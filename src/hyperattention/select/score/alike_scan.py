"""Score keys by averages of alike queries: blocks of keys first, of which the best are opened down to single keys.

An average's score counts relative to the sum of exponentials over all keys, which is that of closed blocks, as if the scores
inside were normal, and that of the keys in opened ones. No average scores all keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.select.score.block_sizes import OPENED
from hyperattention.select.score.groups import grouped
from hyperattention.select.score.key_blocks import KeyBlocks
from hyperattention.select.score.pooling import any_left
from hyperattention.tiling import Tiles

# deviations by which a query may exceed the average of its group
DEVIATIONS = 2.0
# blocks scored for each key scored at last, where blocks are opened more than once: what is closed early is lost
WIDER = 2
# logarithms below count as this: exponentials of less are slow, and add nothing
LEAST_LOG = -80.0


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
            numbers of keys that earlier stages left, ascending, behind them the number of all keys where a tile has fewer;
            and shares of each.
        """
        tiles, keys = self.tiles, blocks[1].mean.shape[1]
        known, query = tiles.by_list(tiles.known)[:, part], self.query[:, self.own(part)]
        room = max(1, self._most_known(part)) if size == 1 else room_of(count)
        index = torch.full((*known.shape, room), keys, dtype=torch.int64, device=known.device)
        share = query.new_zeros(*query.shape[:3], room)
        for one in range(len(known)):
            for at in range(known.shape[1]):
                tile = slice(part.start + at, part.start + at + 1)
                of_list, seen = TileScan.of(self, one, tile), self._counted(known[one, at], tile)
                found = of_list.opened(blocks, one, tuple(x[one, at] for x in left), seen, size, count)
                index[one, at, : len(found[0])], share[one, at, :, : len(found[0])] = found
        return index, share

    def own(self, part: slice) -> slice:
        """Tell where tiles stand in `query`."""
        return slice(part.start - self.begin, part.stop - self.begin)

    def _counted(self, known: Int[Tensor, ""], tile: slice) -> tuple[int, Tensor | None]:
        """Count the keys that a tile's queries all see, or bound them where the number is not at hand."""
        return (int(known), None) if known.device.type == "cpu" else (self._most_known(tile), known)

    def _most_known(self, part: slice) -> int:
        """Bound the keys that all queries of a tile see, by position alone, which needs no look at the device."""
        problem = self.tiles.problem
        if not problem.causal:
            return problem.num_keys
        return max(0, min(self.tiles.number(part.stop - 1) * self.tiles.size, problem.num_keys))


@dataclass(frozen=True)
class TileScan:
    """Averages of the lists of one tile.

    Args:
        query: averages of each group.
        apart: squares of what queries differ by from the averages of their groups.
        half: half of the squares of the averages, averaged over all of them: by squares of its own a sharp list would take
            blocks from the others.
        log_rows: half the logarithm of the queries in each group.
    """

    query: Float[Tensor, "averages width"]
    apart: Float[Tensor, "many width"]
    half: Float[Tensor, " width"]
    log_rows: Float[Tensor, "many groups"]

    @classmethod
    def of(cls, scan: AlikeScan, one: int, tile: slice) -> "TileScan":
        """Take the averages of one tile, of one list of keys."""
        query, spread, log_rows = (x[one, scan.own(tile)][0] for x in (scan.query, scan.spread, scan.log_rows))
        apart, half = spread.chunk(2, 1)
        return cls(query.flatten(0, 1), apart, half.mean(0), log_rows)

    def opened(
        self, blocks: Mapping[int, KeyBlocks], one: int, left: tuple[Tensor, ...],
        known: tuple[int, Tensor | None], size: int, count: int,
    ) -> tuple[Int[Tensor, " some"], Float[Tensor, "many some"]]:  # fmt: skip
        """Open the blocks of the largest shares, and of these again, down to keys: see `AlikeScan.shares`.

        Args:
            blocks: keys by size of blocks.
            one: number of the list of keys.
            left: what earlier stages left of it.
            known: keys that the tile's queries all see; or a bound, and the number of keys as the device knows it.
            size: keys in the first blocks.
            count: keys opened at last.

        Returns:
            the keys and their shares.
        """
        most, exactly = known
        number = torch.arange(most // size, dtype=torch.int64, device=self.query.device)
        some = blocks[size].of(one, slice(0, most // size))
        closed = self.query.new_full(self.log_rows.shape, -torch.inf)
        while True:
            mass, beside = self._masses(some)
            taken = ~any_left(number * size, size, left)
            if exactly is not None:
                hidden = (number + 1) * size > exactly
                mass.masked_fill_(hidden, -torch.inf)
                taken, number = taken | hidden, number.masked_fill(hidden, blocks[1].mean.shape[1])
            weight, top = _weights(mass)
            bar = torch.logaddexp(closed, top + weight.sum(-1).log_()) - self.log_rows
            # as far as the average of a group tells, and as far as its queries may exceed it
            log_share = mass.sub_(bar[..., None]).amax(1).add_(beside)
            if size == 1:
                break
            wanted = -(-(count if size == OPENED else WIDER * count) // OPENED)
            best = log_share.amax(0).masked_fill_(taken, -torch.inf).topk(min(wanted, len(number)), sorted=False).indices
            keep = weight.new_ones(len(number)).index_fill_(0, best, 0.0)
            closed = torch.logaddexp(closed, top + (weight @ keep).log_())
            # inside the opened ones, and what stands behind the last whole block and is in a smaller one
            behind = (most if exactly is None else exactly) // size
            inside = torch.arange(OPENED, dtype=torch.int64, device=number.device)
            number, size = number[best].sort().values[:, None] * OPENED + inside, size // OPENED
            number = torch.cat([number.flatten(), behind * OPENED + inside[:-1]])
            if exactly is None:
                number = number[number < most // size]
            some = blocks[size].of(one, number.clamp(max=blocks[size].mean.shape[1] - 1))
        # those that are left come first, in their order
        order = number.masked_fill(taken, blocks[1].mean.shape[1]).sort()
        return order.values, log_share.clamp_(max=0.0).exp_().index_select(1, order.indices)

    def _masses(self, some: KeyBlocks) -> tuple[Float[Tensor, "many groups some"], Float[Tensor, "many some"]]:
        """Estimate what blocks add to sums of exponentials, and what is added to that for the largest share of a key."""
        mean, variance, log_value = some.mean[0], some.variance, some.log_value[0]
        if variance is None:
            mass = self.query @ mean.T
        else:
            half, log_size = variance[0] @ self.half, log(some.size)
            # n normal scores of deviation s sum up to n exp(s^2 / 2) while s < sqrt(2 log n); beyond, the largest few make
            # the sum: exp(s sqrt(2 log n)) (Derrida, 1981, the random energy model); it would overshoot without bound
            in_sum = torch.where(half <= log_size, half + log_size, 2 * (half * log_size).sqrt())
            mass = torch.addmm(in_sum, self.query, mean.T)
            # a key that stands out counts for more than the sum that it is in
            log_value = log_value + (half - in_sum)
        beside = (DEVIATIONS**2 * self.apart) @ (mean.square() if some.square is None else some.square[0]).T
        return mass.unflatten(0, (len(self.apart), -1)), beside.sqrt_().add_(log_value)


def room_of(count: int) -> int:
    """Count the keys that may be scored at last: opened ones, and some behind the last whole block."""
    return -(-count // OPENED) * OPENED + OPENED - 1


def _weights(
    mass: Float[Tensor, "many groups some"],
) -> tuple[Float[Tensor, "many groups some"], Float[Tensor, "many groups"]]:
    """Return exponentials relative to the largest, and the logarithm of that."""
    if not mass.shape[2]:
        return mass, mass.new_full(mass.shape[:2], -torch.inf)
    # nothing known: any finite number will do
    top = mass.amax(-1).clamp_(min=torch.finfo(mass.dtype).min)
    return (mass - top[..., None]).clamp_(min=LEAST_LOG).exp_(), top
