"""Scatterbrain: exact attention over a sparse support, and random features for all other keys."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hyperattention.check import positive
from hyperattention.features.positive_random import PositiveRandom
from hyperattention.merge import merge
from hyperattention.methods.base import AttentionMethod, Cost, exact_pairs
from hyperattention.methods.low_rank import LowRank, count_listed
from hyperattention.methods.method import Method, attend_lists
from hyperattention.methods.rest import Rest, by_place, without_leading
from hyperattention.problem import Problem
from hyperattention.remainder import remainder
from hyperattention.select.stage import LookAhead, Stage
from hyperattention.transforms import refuse_transforms
from hyperattention.types import Partial


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
            rest = Rest.of(problem, self.stages, self.tile)
        exact = [attend_lists(problem, selected)] if selected else []
        if rest.surely_empty and exact:
            return exact[0], none
        mapped = LowRank.of(problem, PositiveRandom(self.num_features, spread=self.spread), rest.centring(self.centred))
        low_rank = mapped.attend(rest)
        far = without_leading(selected, rest.num_runs)
        if far:
            left = remainder(low_rank, mapped.attend_listed(far))
            low_rank = left.partial
            if counted:
                none = (left.clamped & (count_listed(problem, far) < rest.count)).sum(-1)
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
        near = len(by_place(self.stages))
        again = sum(stage.slots(self.tile) for stage in self.stages[near:]) * (self.num_features + head_dim) / (2 * head_dim)
        choosing = sum(stage.selection_pairs(num_keys, self.tile, head_dim, is_causal) for stage in self.stages)
        gathered = 2 * listed * head_dim * -(-num_keys // self.tile)
        memory_bytes = 4 * (gathered + 2 * num_keys * (2 * head_dim + self.num_features))
        pairs = listed + again + self.num_features
        return Cost(
            float(pairs), choosing + self.num_features, exact_pairs(num_keys, is_causal), memory_bytes, self.complete
        )
