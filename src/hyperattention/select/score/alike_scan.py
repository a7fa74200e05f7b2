"""Score blocks of keys by averages of alike queries, and allow for what averages hide."""

from dataclasses import dataclass, replace
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.select.score.alike_product import AlikeProduct, largest_shares
from hyperattention.select.score.eight_bits import EightBitKeys, rounded_queries
from hyperattention.select.score.groups import grouped
from hyperattention.select.score.mass import total_mass
from hyperattention.select.score.pooling import score_bytes
from hyperattention.select.score.precision import for_estimates, integers_are_fast
from hyperattention.select.score.scratch import Scratch
from hyperattention.tiling import Tiles

# blocks and averages scored by one product on a CPU, or for one tile: few enough scores to stay in the cache until they are
# compared
_BLOCKS, _AVERAGES = 4096, 128
# blocks over which the scores of a query are taken for normal when it is normalised: the fewer, the better its shares
NORMAL = 16
# float32 numbers held for each number of a key while keys are averaged
_KEY_NUMBERS = 6
# bound of the logarithm of relative distances of values: estimates only, which must not starve a key
MOST_LOG_VALUE = 2.0
# deviations by which a query may exceed the average of its group
DEVIATIONS = 2.0


@dataclass(frozen=True)
class Blocks:
    """Blocks of equally many keys.

    Args:
        size: keys in a block.
        keys: the mean of each, centred.
        integers: the same in 8 bits, where integers are fast.
        squares: squares of the means before they were rounded, beside the variances inside blocks of more than one key.
        moments: means beside half the variances of whole stretches of blocks.
        log_size: logarithm of the keys in such a stretch.
        log_value: logarithm of how far values lie from the mean of the first ones, relative to these, averaged over blocks.
    """

    size: int
    keys: Float[Tensor, "lists blocks width"]
    integers: EightBitKeys | None
    squares: Float[Tensor, "lists blocks squares"]
    moments: Float[Tensor, "lists stretches moments"]
    log_size: float
    log_value: Float[Tensor, "lists blocks"]

    def at(self, one: int, index: Int[Tensor, " some"]) -> "Blocks":
        """Take some blocks of one list; stretches are those of all."""
        integers = self.integers
        if integers is not None:
            few = integers.keys[one].index_select(0, index)[None]
            integers = EightBitKeys(few, integers.step[one][None], integers.fit[one][None])
        keys, squares, log_value = (x[one].index_select(0, index)[None] for x in (self.keys, self.squares, self.log_value))
        return replace(
            self, keys=keys, integers=integers, squares=squares, moments=self.moments[one][None], log_value=log_value
        )


def blocks_of(k: Float[Tensor, "lists keys width"], v: Float[Tensor, "lists keys value_dim"], size: int, num: int) -> Blocks:
    """Centre keys, and average them over blocks.

    Args:
        k: the keys.
        v: their values.
        size: keys in a block.
        num: leading keys by which the others are centred and scaled, so that no tile looks ahead.

    Returns:
        the blocks, in float32 or wider; the last may reach beyond the keys, as if zeros followed.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    first = k[:, :num].to(wide)
    centre, stretch = first.mean(1, keepdim=True), NORMAL * size
    # whole stretches at a time, so that little more than the averages is held
    step = stretch * max(1, score_bytes(k.device) // (4 * _KEY_NUMBERS * k.shape[0] * k.shape[2] * stretch))
    averages = [
        _averages(_centred(k[:, at : at + step].to(wide), centre), size) for at in range(0, max(1, k.shape[1]), step)
    ]
    mean, squares, moments = (torch.cat(x, 1) for x in zip(*averages, strict=True))
    integers = EightBitKeys.of(mean, _centred(first, centre)) if integers_are_fast(mean) else None
    log_value = _log_values(v, size, num).to(mean.dtype)
    return Blocks(size, for_estimates(mean), integers, squares, moments, log(stretch), log_value)


def _log_values(v: Tensor, size: int, num: int) -> Float[Tensor, "lists blocks"]:
    """Tell how much a draw of each block moves an output, which lies near the mean of the values: within a bound."""
    first = v[:, :num].to(torch.promote_types(v.dtype, torch.float32))
    centre = torch.nan_to_num(first, nan=0.0, posinf=0.0, neginf=0.0).mean(1, keepdim=True)
    step = max(1, score_bytes(v.device) // (4 * _KEY_NUMBERS * v.shape[0] * max(1, v.shape[2])))
    far = [_centred(part.to(centre.dtype), centre).norm(dim=2) for part in v.split(step, 1)]
    distance = torch.cat(far, 1)
    log = (distance / distance[:, :num].mean(1, keepdim=True)).log_().nan_to_num_(nan=0.0)
    log.clamp_(-MOST_LOG_VALUE, MOST_LOG_VALUE)
    return torch.nn.functional.pad(log, (0, -log.shape[1] % size)).unflatten(1, (-1, size)).mean(2)


def _centred(k: Tensor, centre: Tensor) -> Tensor:
    """Centre keys; one that is not finite tells nothing."""
    return torch.nan_to_num_(k - centre, nan=0.0, posinf=0.0, neginf=0.0)


def _averages(keys: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Average over blocks, give what varies between and inside them, and the moments of whole stretches."""
    mean, variance = _moments(keys, size)
    stretches, spread = _moments(keys[:, : keys.shape[1] // (NORMAL * size) * NORMAL * size], NORMAL * size)
    squares = mean.square() if size == 1 else torch.cat([mean.square(), variance], 2)
    return mean, squares, torch.cat([stretches, spread * 0.5], 2)


def _moments(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Average keys over blocks, and tell their variances."""
    if size == 1:
        return keys, torch.zeros_like(keys)
    blocks = torch.nn.functional.pad(keys, (0, 0, 0, -keys.shape[1] % size)).unflatten(1, (-1, size))
    mean = blocks.mean(2)
    return mean, (blocks.square().mean(2) - mean.square()).clamp_(min=0)


@dataclass(frozen=True)
class AlikeScan:
    """Averages of alike queries, and what they are compared with.

    Args:
        tiles: the problem tiled by position.
        query: averages of each group, ``[lists, tiles, many, groups, width]``.
        spread: squares of what the queries of a list differ by from the averages of their groups, beside half of the squares
            of the averages: what they leave out of their scores' variance, and how much that inside blocks counts.
        log_rows: half the logarithm of the queries in each group, relative to their mean number: the variance of a draw adds
            up over queries.
        compared: averages of each group in the directions by which queries are grouped.
        scores: memory for scores.
        integers: memory for scores in 8-bit integers.
        begin: place of the first tile in `query`.
    """

    tiles: Tiles
    query: Float[Tensor, "lists tiles many groups width"]
    spread: Float[Tensor, "lists tiles many moments"]
    log_rows: Float[Tensor, "lists tiles many groups"]
    compared: Float[Tensor, "lists tiles many groups directions"]
    scores: Scratch
    integers: Scratch
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
        share = one_of / rows[:, None].clamp(min=1)
        mean, compared = (share.transpose(1, 2) @ x.flatten(0, 2) for x in (query, few))
        apart = (query.flatten(0, 2) - one_of @ mean).square().mean(1)
        return cls._made(tiles, begin, *(x.unflatten(0, query.shape[:3]) for x in (mean, apart, rows, compared)))

    @classmethod
    def _made(cls, tiles: Tiles, begin: int, mean: Tensor, apart: Tensor, rows: Tensor, compared: Tensor) -> "AlikeScan":
        """Put averages beside what they leave out."""
        spread = torch.cat([apart, mean.square().mean(3) * 0.5], 3)
        log_rows = (rows / rows.mean(3, keepdim=True)).clamp(min=torch.finfo(rows.dtype).tiny).log() * 0.5
        scores, integers = Scratch(for_estimates(mean[:0]), 0), Scratch(mean.new_empty(0, dtype=torch.int32), 0)
        return cls(tiles, mean, spread, log_rows, compared, scores, integers, begin)

    def coarser(self, groups: int) -> "AlikeScan":
        """Group the averages of all lists of each tile, and average those of every group.

        Args:
            groups: groups of each tile.

        Returns:
            a scan with one list for each tile.
        """
        query, compared = (x.flatten(2, 3).flatten(0, 1) for x in (self.query, self.compared))
        # queries in each, relative to their mean number
        rows = (2 * self.log_rows).exp_().flatten(2).flatten(0, 1)[..., None]
        one_of = grouped(compared, min(groups, query.shape[1]))
        share = one_of * rows
        count = share.sum(1)
        share /= count[:, None].clamp(min=torch.finfo(rows.dtype).tiny)
        mean, compared = (share.transpose(1, 2) @ x for x in (query, compared))
        apart = ((query - one_of @ mean).square() * rows).sum(1) / rows.sum(1)
        # what the averages left out before
        apart += self.spread[..., : query.shape[2]].mean(2).flatten(0, 1)
        whole = (x.unflatten(0, (len(self.query), -1))[:, :, None] for x in (mean, apart, count, compared))
        return AlikeScan._made(self.tiles, self.begin, *whole)

    def of_tiles(self, part: slice) -> "AlikeScan":
        """Take some tiles alone."""
        own = self.own(part)
        some = {name: getattr(self, name)[:, own] for name in ("query", "spread", "log_rows", "compared")}
        return replace(self, **some, begin=part.start)

    def own(self, part: slice) -> slice:
        """Tell where tiles stand in `query`."""
        return slice(part.start - self.begin, part.stop - self.begin)

    def shares(self, part: slice, blocks: Blocks, num: int) -> Float[Tensor, "lists chunk many num"]:
        """Estimate the largest share that a query of each list gives a key of each of the first `num` blocks."""
        return self.log_shares(part, blocks, num).clamp_(max=0.0).exp_()

    def log_shares(self, part: slice, blocks: Blocks, num: int) -> Float[Tensor, "lists chunk many num"]:
        """Estimate the logarithms of the same; rough estimates may exceed 0, and blocks that no query knows have -inf."""
        known, seen = self.bars(part, blocks)
        share, chunk = self._allowance(part, blocks, num), part.stop - part.start
        tiles, stretch = chunk, max(1, num)
        if self.query.device.type == "cpu":
            tiles, stretch = max(1, _AVERAGES // self.query.shape[2:4].numel()), _BLOCKS
        for one in range(len(share)):
            for at in range(0, chunk, tiles):
                some = slice(at, min(at + tiles, chunk))
                query = self.query[one, self.own(part)][some]
                products = self._products(query, blocks, one, known[one, some], seen[one, some])
                count = self._most_known(part, some, blocks.size, num)
                for begin in range(0, count, stretch):
                    of = slice(begin, min(begin + stretch, count))
                    best = largest_shares(products, of)
                    # on a CPU most blocks are known to all tiles
                    if known.device.type != "cpu" or of.stop > int(known[one, some].min()):
                        number = torch.arange(of.start, of.stop, dtype=torch.int64, device=known.device)
                        best.masked_fill_((number >= known[one, some, None])[:, None], -torch.inf)
                    share[one, some, :, of].add_(best)
                share[one, some, :, count:] = -torch.inf
        return share

    def shares_among(
        self, part: slice, keys: Blocks, index: Int[Tensor, "lists chunk some"]
    ) -> Float[Tensor, "lists chunk many some"]:
        """Estimate the largest share that a query of each list gives some keys of each tile; 0 beyond those it knows.

        Args:
            part: the tiles.
            keys: all keys, blocks of one key each.
            index: numbers of the keys to score.

        Returns:
            the shares.
        """
        known, seen = self.bars(part, keys)
        share = self.query.new_empty(*index.shape[:2], self.query.shape[2], index.shape[2])
        query = self.query[:, self.own(part)]
        for one in range(len(index)):
            for at in range(index.shape[1]):
                tile = slice(at, at + 1)
                some = keys.at(one, index[one, at].clamp(max=keys.keys.shape[1] - 1))
                own = share[one, at]
                own.copy_(self._excess(self.spread[one : one + 1, self.own(part)][:, tile], some, index.shape[2])[0, 0])
                products = self._products(query[one, tile], some, 0, known[one, tile], seen[one, tile])
                for begin in range(0, index.shape[2], _BLOCKS):
                    of = slice(begin, min(begin + _BLOCKS, index.shape[2]))
                    own[:, of].add_(largest_shares(products, of)[0]).clamp_(max=0.0).exp_()
        return share.masked_fill_((index >= known[..., None])[:, :, None], 0.0)

    def bars(
        self, part: slice, blocks: Blocks
    ) -> tuple[Int[Tensor, "lists chunk"], Float[Tensor, "lists chunk many groups"]]:
        """Count the leading blocks that each tile may score, and tell what each average's scores are compared with."""
        known = self._known(part, blocks.size)
        return known, self._log_sums(part, blocks, known // NORMAL) - self.log_rows[:, self.own(part)]

    def _known(self, part: slice, size: int) -> Int[Tensor, "lists chunk"]:
        """Count the whole blocks that every query of a tile sees."""
        tiles = self.tiles
        return tiles.by_list(tiles.known)[:, part] // size

    def _most_known(self, part: slice, some: slice, size: int, num: int) -> int:
        """Bound the same for a few tiles, by position alone, which needs no look at the device."""
        if not self.tiles.problem.causal:
            return min(num, self.tiles.problem.num_keys // size)
        last = self.tiles.number(part.start + some.stop - 1) * self.tiles.size
        return max(0, min(num, min(last, self.tiles.problem.num_keys) // size))

    def _allowance(self, part: slice, blocks: Blocks, num: int) -> Float[Tensor, "lists chunk many num"]:
        """Tell by how much a draw may count for more than an average does: by deviations, and by how far its value lies."""
        return self._excess(self.spread[:, self.own(part)], blocks, num)

    @staticmethod
    def _excess(spread: Tensor, blocks: Blocks, num: int) -> Float[Tensor, "lists chunk many num"]:
        """Do so for lists of which `spread` is known."""
        width, many = blocks.keys.shape[2], spread.shape[2]
        moments, spread = blocks.squares[:, :num].transpose(1, 2), spread.flatten(1, 2)
        extra = (spread[..., :width] * DEVIATIONS**2 @ moments[:, :width]).sqrt_()
        if blocks.size > 1:
            extra.baddbmm_(spread[..., width:], moments[:, width:])
        return extra.add_(blocks.log_value[:, None, :num]).unflatten(1, (-1, many))

    def _log_sums(self, part: slice, blocks: Blocks, known: Tensor) -> Float[Tensor, "lists chunk many groups"]:
        """Estimate each query's log-sum-exp over whole stretches before its tile, scores inside one taken for normal."""
        query, chunk, moments = self.query[:, self.own(part)], part.stop - part.start, blocks.moments
        sums, tiles = query.new_empty(query.shape[:4]), chunk
        if query.device.type == "cpu":
            tiles = max(1, _AVERAGES // query.shape[2:4].numel())
        for one in range(len(sums)):
            for at in range(0, chunk, tiles):
                some = slice(at, min(at + tiles, chunk))
                count = self._most_known(part, some, blocks.size * NORMAL, moments.shape[1])
                sums[one, some] = _log_sums(query[one, some], moments[one, :count], known[one, some], blocks.log_size)
        return sums

    def _products(self, query: Tensor, blocks: Blocks, one: int, known: Tensor, seen: Tensor) -> tuple[AlikeProduct, ...]:
        """Prepare products of a few tiles of one list: of floats, of integers, or of both where some tiles need floats."""
        keys = blocks.keys[one]
        one_each, all_tiles = query.new_ones(*query.shape[:2], 1), torch.ones_like(known, dtype=torch.bool)
        floats = AlikeProduct.of(query.to(keys.dtype), keys, one_each, seen, all_tiles, self.scores)
        if blocks.integers is None:
            return (floats,)
        scaled = query * blocks.integers.step[one]
        precise = blocks.integers.precise(one, scaled, known)
        if not precise.any():
            return (floats,)
        rounded, unit = rounded_queries(scaled)
        integers = AlikeProduct.of(rounded, blocks.integers.keys[one], unit, seen, precise, self.integers)
        # all tiles in both ways, so that no product's size depends on values
        return (integers,) if precise.all() else (floats, integers)


def _log_sums(
    query: Float[Tensor, "tiles many groups width"], moments: Float[Tensor, "stretches moments"],
    known: Int[Tensor, " tiles"], log_size: float,
) -> Float[Tensor, "tiles many groups"]:  # fmt: skip
    """Estimate log-sum-exps over the first `known` stretches, each of exp(`log_size`) keys."""
    rows, (mean, variance) = query.flatten(0, 2), moments.split(query.shape[3], 1)
    score, half = rows @ mean.T, rows.square() @ variance.T
    # n normal scores of deviation s sum up to n exp(s^2 / 2) while s < sqrt(2 log n); beyond, the largest few make the
    # sum: exp(s sqrt(2 log n)) (Derrida, 1981, the random energy model); a sharp query would overshoot without bound
    beyond = half.mul_(1 / log_size).sqrt_()  # s relative to sqrt(2 log n)
    within = beyond.clamp(max=1)
    score.add_(beyond.sub_(within), alpha=2 * log_size).add_(within.square_(), alpha=log_size)
    score = score.view(*query.shape[:3], -1)
    hidden = torch.arange(score.shape[3], dtype=torch.int64, device=score.device) >= known[:, None]
    score.masked_fill_(hidden[:, None, None], -torch.inf)
    least = torch.finfo(score.dtype).min
    top = score.amax(-1, keepdim=True) if score.shape[3] else score.new_full((*score.shape[:3], 1), least)
    # added up so that hidden stretches change no bit: some tiles may see more or fewer
    sums = total_mass(score.sub_(top).exp_()).log_().add_(top)[..., 0]
    return torch.nan_to_num_(sums, nan=least, neginf=least).add_(log_size)
