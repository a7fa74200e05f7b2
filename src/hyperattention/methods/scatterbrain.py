"""Scatterbrain: exact attention over a sparse support, and random features for all other keys."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.check import positive
from hyperattention.features.positive_random import PositiveRandom
from hyperattention.kernels.feature.operator import feature_attention
from hyperattention.kernels.listed_features.operator import listed_features
from hyperattention.merge import merge
from hyperattention.methods.base import AttentionMethod, Cost, exact_pairs
from hyperattention.methods.method import Method, attend_lists
from hyperattention.problem import Problem
from hyperattention.remainder import remainder
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage, Tiling
from hyperattention.tiling import Tiles, cut
from hyperattention.transforms import refuse_transforms
from hyperattention.types import Partial, Selection


@dataclass(frozen=True, init=False, repr=False)
class Scatterbrain(AttentionMethod):
    """Compute attention exactly over the keys that some stages list, and estimate all other keys by random features.

    out_i = (sum_{j in S_i} exp(s_ij) v_j + sum_{j not in S_i} phi_i . phi_j v_j) / (the same sums without v_j)

    which is the paper's phi(Q) phi(K)' V + sum_S (exp - phi . phi) V over the same with ones. Keys that leading stages take
    by position (Sinks, Window) are left out of the low-rank part by ranges, so nothing is subtracted for them. What the
    low-rank part says about the keys of all other stages is computed again, and subtracted: see `remainder` for the rule by
    which a row's rest counts as 0 if rounding leaves nothing of it. `attend_counted` counts these rows.

    Source: Chen et al., 2021 (arXiv:2110.15343), Scatterbrain; features: Choromanski et al., 2021 (arXiv:2009.14794).
    Differs: any stages as support, where the paper hashes (SMYRF) and its code has a sliding window as well; nothing is
    subtracted where ranges say it; keys are centred (exp(q . (k - c)) and a factor of the row), by the leading keys that
    every row with a low-rank part sees, so that nothing looks ahead; the paper's code limits denominators from below by a
    constant; frequencies are wider by `spread`.
    Cost: the slots of the support, and about 1.5 `num_features` more per query; keys that are subtracted cost their features
    in addition.   Guarantee: exact on the support; numerator and denominator are unbiased, apart from rounding. The variance
    grows exponentially with ||q + k||^2, so it is noise for heads with large norms: measure it.

    Args:
        *stages: the support, in order; none for random features alone.
        num_features: number of features, even.
        spread: variance of the frequencies' coordinates, at least 1: see `PositiveRandom`.
        centred: whether keys are centred before they are mapped.
        tile: number of consecutive positions whose queries share one list of keys.

    Raises:
        TypeError: if an argument is not a stage.
        ValueError: if a stage draws, because its draws represent all remaining keys already; or an argument is out of range.

    Example:
        >>> Scatterbrain(Sinks(4), Window(256), num_features=128)
        Scatterbrain(Sinks(num=4), Window(size=256), num_features=128)
    """

    stages: tuple[Stage, ...]
    num_features: int
    spread: float
    centred: bool
    tile: int

    # a dataclass takes no arguments by place without number, nor prints them
    def __init__(
        self, *stages: Stage, num_features: int = 256, spread: float = 1.0, centred: bool = True, tile: int = 64
    ) -> None:
        if stages:
            Method(*stages, tile=tile)
        positive("Scatterbrain", tile=tile)
        PositiveRandom(num_features, spread=spread)
        for stage in stages:
            if stage.complete:
                raise ValueError(
                    f"Scatterbrain cannot have {stage!r} in its support: its draws represent all remaining keys already, so "
                    "the low-rank part would count these keys twice; use stages that take keys with certainty, such as "
                    "TopBlocks or HashBuckets"
                )
        given = {"stages": stages, "num_features": num_features, "spread": spread, "centred": centred, "tile": tile}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        given = [*map(repr, self.stages), f"num_features={self.num_features}"]
        given += [f"spread={self.spread!r}"] * (self.spread != 1) + ["centred=False"] * (not self.centred)
        return f"Scatterbrain({', '.join(given + [f'tile={self.tile}'] * (self.tile != 64))})"

    @property
    def complete(self) -> bool:
        """True: every key is in the support or estimated without bias."""
        return True

    @property
    def looks_ahead(self) -> LookAhead:
        """The farthest look-ahead of any stage; features and centres depend on no later token."""
        return max((stage.looks_ahead for stage in self.stages), default=LookAhead.NOTHING)

    def attend(self, problem: Problem) -> Partial:
        """Attend to the support exactly, estimate the rest, merge."""
        return self._attend(problem, counted=False)[0]

    def attend_counted(self, problem: Problem) -> tuple[Partial, Int[Tensor, "batch heads"]]:
        """Compute attention as `attend` does, and count the rows whose low-rank part was lost to rounding.

        Args:
            problem: the problem.

        Returns:
            the result of `attend`, and for each head the number of rows with keys outside the support whose rest was clamped
            to 0; always 0 if the support has only ranges of positions.
        """
        return self._attend(problem, counted=True)

    def _attend(self, problem: Problem, *, counted: bool) -> tuple[Partial, Tensor]:
        refuse_transforms("attention by a method", problem.q, problem.k, problem.v)
        none = torch.zeros(problem.q.shape[:2], dtype=torch.int64, device=problem.device)
        with torch.no_grad():
            selected = Method(*self.stages, tile=self.tile).selections(problem) if self.stages else ()
            rest = _Rest.of(problem, self.stages, self.tile)
        exact = [attend_lists(problem, selected)] if selected else []
        if rest.surely_empty and exact:
            return exact[0], none
        mapped = _Mapped.of(problem, PositiveRandom(self.num_features, spread=self.spread), rest.centring(self.centred))
        low_rank = mapped.attend(rest)
        far = _without_leading(selected, rest.num_runs)
        if far:
            left = remainder(low_rank, mapped.attend_listed(far))
            low_rank = left.partial
            if counted:
                none = (left.clamped & (_listed(problem, far) < rest.count)).sum(-1)
        low_rank = Partial(low_rank.out, low_rank.lse + mapped.query_log_scale)
        return merge([*exact, low_rank]), none

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys, before running.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost: a product of features is counted by its width relative to `head_dim`. Adding a key to the sums and
            reading them costs as much as scoring and averaging `num_features` keys; mapping queries and keys is selection.
        """
        listed = sum(stage.slots(self.tile) for stage in self.stages)
        near = len(_by_place(self.stages))
        again = sum(stage.slots(self.tile) for stage in self.stages[near:]) * (self.num_features + head_dim) / (2 * head_dim)
        choosing = sum(stage.selection_pairs(num_keys, self.tile, head_dim, is_causal) for stage in self.stages)
        gathered = 2 * listed * head_dim * -(-num_keys // self.tile)
        memory_bytes = 4 * (gathered + 2 * num_keys * (2 * head_dim + self.num_features))
        pairs = listed + again + self.num_features
        return Cost(
            float(pairs), choosing + self.num_features, exact_pairs(num_keys, is_causal), memory_bytes, self.complete
        )


def _by_place(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return the leading stages that take ranges of positions."""
    number = next((place for place, stage in enumerate(stages) if not stage.by_place), len(stages))
    return stages[:number]


@dataclass(frozen=True)
class _Rest:
    """The keys that each row sees and no leading stage took by position: one range of leading keys, and one of last keys.

    Args:
        begin: first key of the first range, the same for all rows.
        before: end of the first range for every row.
        after: first key of the second range for every row, which ends with the last live key; None if there is none.
        total: live keys of each batch row.
        num_runs: runs that the leading stages list.
        known: leading keys that every row with a rest sees.
        surely_empty: whether no row has a rest, as far as positions tell without reading from the device.
    """

    begin: int
    before: Int[Tensor, "batch queries"]
    after: Int[Tensor, "batch queries"] | None
    total: Int[Tensor, "batch 1"]
    num_runs: int
    known: int
    surely_empty: bool

    @classmethod
    def of(cls, problem: Problem, stages: tuple[Stage, ...], tile: int) -> "_Rest":
        """Run the leading stages, and see what they leave."""
        tiles, covered, num_runs = cut(problem, tile), CoveredKeys(), 0
        for stage in _by_place(stages):
            runs, covered = stage.select(tiles, covered)
            num_runs += len(runs)
        _, hole_begin, hole_end, _ = covered.bounds(tiles)
        limit = tiles.limit.flatten(1)[:, tiles.front : tiles.front + problem.num_queries]
        before = torch.minimum(_of_rows(tiles, hole_begin), limit).clamp(min=covered.prefix)
        two_sided = covered.gap is not None and not problem.causal
        # a row with a rest is in a tile that begins after prefix and window: it sees these keys, and one of the rest
        known = covered.prefix + max(1, covered.near) if problem.causal else problem.num_keys
        return cls(
            covered.prefix,
            before,
            _of_rows(tiles, hole_end) if two_sided else None,
            tiles.total,
            num_runs,
            known,
            problem.num_keys <= covered.prefix,
        )

    @property
    def count(self) -> Int[Tensor, "batch 1 queries"]:
        """Count the keys of every row's rest."""
        count = (self.before - self.begin).clamp(min=0)
        return (count if self.after is None else count + (self.total - self.after).clamp(min=0))[:, None]

    def centring(self, centred: bool) -> Int[Tensor, "batch 1"]:
        """Count the leading keys whose mean is the centre: 0 for none."""
        return self.total.clamp(max=self.known if centred else 0)


def _of_rows(tiles: Tiles, x: Int[Tensor, "batch tiles"]) -> Int[Tensor, "batch queries"]:
    """Give every row the number of its tile."""
    return x.repeat_interleave(tiles.size, 1)[:, tiles.front : tiles.front + tiles.problem.num_queries]


@dataclass(frozen=True)
class _Mapped:
    """A problem whose queries and keys are mapped to features, with a log scale of each."""

    problem: Problem
    query: Float[Tensor, "batch heads queries features"]
    key: Float[Tensor, "batch kv_heads keys features"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    query_log_scale: Float[Tensor, "batch heads queries"]
    key_log_scale: Float[Tensor, "batch kv_heads keys"]

    @classmethod
    def of(cls, problem: Problem, features: PositiveRandom, centring: Int[Tensor, "batch 1"]) -> "_Mapped":
        """Map the tokens; `centring` leading keys have their mean at 0 afterwards."""
        wide = torch.promote_types(problem.q.dtype, torch.float32)
        q, k, v = (x.to(wide) for x in (problem.q, problem.k, problem.v))
        q = q if problem.scale >= 0 else -q
        scale = abs(problem.scale)
        leading = torch.arange(k.shape[2], dtype=torch.int64, device=k.device) < centring
        total = k.masked_fill(~leading[:, None, :, None], 0.0).sum(2, keepdim=True)
        centre = total / centring.clamp(min=1)[:, :, None, None]
        frequency = features.frequencies(k.shape[3], problem.head_index, seed=problem.seed, layer=problem.layer)
        query, query_log_scale = features.map(q, frequency, scale)
        # exp(q . k) = exp(q . (k - c)) exp(q . c)
        shift = (q.unflatten(1, (k.shape[1], -1)) * centre[:, :, None]).sum(-1).flatten(1, 2) * scale
        key, key_log_scale = features.map(k - centre, frequency, scale)
        return cls(problem, query, key, v, query_log_scale + shift, key_log_scale)

    def attend(self, rest: _Rest) -> Partial:
        """Attend to the keys of the rest, without the log scales of the queries."""
        first = Partial(
            *feature_attention(
                self.query,
                self.key,
                self.value,
                key_log_scale=self.key_log_scale,
                row_limit=rest.before,
                first_key=rest.begin,
            )
        )
        if rest.after is None:
            return first
        number = torch.arange(self.key.shape[2], dtype=torch.int64, device=self.key.device)
        scale = self.key_log_scale.masked_fill((number >= rest.total)[:, None], -torch.inf)
        # in reverse order the last keys are leading keys
        key, value, scale = (x.flip(2) for x in (self.key, self.value, scale))
        last = feature_attention(self.query, key, value, key_log_scale=scale, row_limit=self.key.shape[2] - rest.after)
        return merge([first, Partial(*last)])

    def attend_listed(self, selected: tuple[tuple[Tiling, Selection], ...]) -> Partial:
        """Attend to listed keys by their features, without the log scales of the queries."""
        key, value, scale = (x.flatten(0, 1) for x in (self.key, self.value, self.key_log_scale))
        return _over_lists(self.query, key, value, scale, selected)


def _over_lists(
    query: Tensor, key: Tensor, value: Tensor, scale: Tensor, selected: tuple[tuple[Tiling, Selection], ...]
) -> Partial:
    partials = []
    for tiling, selection in selected:
        out, lse = listed_features(tiling.arrange(query), key, value, scale, selection)
        partials.append(Partial(tiling.restore(out), tiling.restore(lse)))
    return merge(partials)


def _without_leading(selected: tuple[tuple[Tiling, Selection], ...], num_runs: int) -> tuple[tuple[Tiling, Selection], ...]:
    """Drop the runs of the leading stages, which come first in the tiling of positions, and tilings without runs."""
    if not selected:
        return ()
    (tiles, shared), *apart = selected
    far = ((tiles, replace(shared, runs=shared.runs[num_runs:])), *apart)
    return tuple((tiling, selection) for tiling, selection in far if selection.runs)


def _listed(problem: Problem, selected: tuple[tuple[Tiling, Selection], ...]) -> Float[Tensor, "batch heads queries"]:
    """Count the keys that lists hold for every row: attention with equal weights tells their log."""
    query, key = (x.detach()[..., :1].float().mul(0).nan_to_num() + 1 for x in (problem.q, problem.k))
    key = key.flatten(0, 1)
    return _over_lists(query, key, key, torch.zeros_like(key[..., 0]), selected).lse.exp().round()
