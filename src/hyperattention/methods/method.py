"""A method: an ordered, immutable tuple of stages; its repr is the code that creates it."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hyperattention.check import positive
from hyperattention.kernels.list.operator import list_attention
from hyperattention.merge import merge
from hyperattention.methods.base import AttentionMethod, Cost, exact_pairs, refuse_spans
from hyperattention.methods.standard_error import standard_error
from hyperattention.problem import Problem
from hyperattention.select.placed import placed
from hyperattention.select.stage import CoveredKeys, LookAhead, Stage, Tiling
from hyperattention.tiling import Tiles
from hyperattention.transforms import refuse_transforms
from hyperattention.types import Partial, Selection


@dataclass(frozen=True, init=False, repr=False)
class Method(AttentionMethod):
    """An ordered list of stages; a key belongs to the first stage that lists it.

    Args:
        *stages: the stages, in order.
        tile: number of consecutive positions whose queries share one list of keys.

    Raises:
        TypeError: if an argument is not a stage.
        ValueError: if there is no stage, a stage cannot follow the stages before it, or `tile` is not positive.

    Example:
        >>> Method(Sinks(4), Window(256), Draw(64))
        Method(Sinks(num=4), Window(size=256), Draw(num=64, by=Uniform()))
    """

    stages: tuple[Stage, ...]
    tile: int

    # a dataclass takes no arguments by place without number, nor prints them
    def __init__(self, *stages: Stage, tile: int = 64) -> None:
        for stage in stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"Method takes stages such as Window(256), not {stage!r} of type {type(stage).__name__}")
        if not stages:
            raise ValueError("Method() needs at least one stage; for exact attention use Exact()")
        positive("Method", tile=tile)
        for place, stage in enumerate(stages):
            stage.check_after(stages[:place])
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "tile", tile)

    def __repr__(self) -> str:
        tile = "" if self.tile == 64 else f", tile={self.tile}"
        return f"Method({', '.join(map(repr, self.stages))}{tile})"

    @property
    def complete(self) -> bool:
        """Whether every visible key has an expected weight of one."""
        return any(stage.complete for stage in self.stages)

    @property
    def looks_ahead(self) -> LookAhead:
        """How far beyond a row its list of keys may depend on queries or keys: the farthest of any stage."""
        return max(stage.looks_ahead for stage in self.stages)

    @property
    def reads_keys(self) -> bool:
        """Whether the choice of keys reads key tensors."""
        return any(stage.reads_keys for stage in self.stages)

    @property
    def reads_values(self) -> bool:
        """Whether the choice of keys reads value tensors."""
        return any(stage.reads_values for stage in self.stages)

    def select(self, problem: Problem) -> tuple[Tiles, Selection]:
        """Run the stages and list the keys that each tile reads, for stages that share tiles of positions.

        Args:
            problem: the problem.

        Returns:
            the tiles and their lists.

        Raises:
            ValueError: if a stage listed keys for tiles of its own, which `selections` returns as well.
        """
        (tiles, selection), *apart = self.selections(problem)
        if apart:
            raise ValueError(
                f"select of {self!r} would leave out the keys that a stage lists for tiles of its own: use selections, "
                "which returns every tiling with its lists"
            )
        assert isinstance(tiles, Tiles)
        return tiles, selection

    def selections(self, problem: Problem) -> tuple[tuple[Tiling, Selection], ...]:
        """Run the stages and list the keys that each tile reads, in every tiling.

        Args:
            problem: the problem.

        Returns:
            tiles and their lists: first the tiles of positions that most stages share, then tiles that a stage made itself.
        """
        refuse_spans(self, problem)
        refuse_transforms("attention by a method", problem.q, problem.k, problem.v)
        begun = placed(problem, self.stages, self.tile)
        tiles, covered, runs, apart = begun.tiles, begun.covered, begun.runs, ()
        for stage in begun.rest:
            hashed = covered.labels is not None
            own, covered = stage.select_apart(tiles, covered)
            more, covered = stage.select(tiles, covered)
            runs += tuple(replace(run, labelled=hashed) for run in more)
            apart += own
        row_label, key_label = _label_rows(tiles, covered)
        shared = Selection(runs, row_limit=begun.row_limit, key_row=begun.key_row, row_label=row_label, key_label=key_label)
        return (tiles, shared), *apart

    def attend(self, problem: Problem) -> Partial:
        """Select keys, compute attention over each selection, merge."""
        with torch.no_grad():
            selected = self.selections(problem)
        return attend_lists(problem, selected)

    def attend_with_error(self, problem: Problem) -> tuple[Partial, Float[Tensor, "batch heads queries"]]:
        """Compute attention as `attend` does, then read the drawn keys again for the standard error of every row.

        Args:
            problem: the problem.

        Returns:
            the results of `attend` and of `standard_error`.

        Raises:
            ValueError: if the method drops keys.
        """
        if not self.complete:
            raise ValueError(
                f"{self!r} drops keys, and no draw estimates the error of that: end the method with a stage such as "
                "Draw(64), or measure the error with audit=64"
            )
        if not all(stage.tells_error for stage in self.stages):
            return super().attend_with_error(problem)
        with torch.no_grad():
            selected = self.selections(problem)
        partial = attend_lists(problem, selected)
        return partial, standard_error(problem, selected, partial)

    def cost(self, num_keys: int, *, is_causal: bool = True, head_dim: int = 64) -> Cost:
        """Return the cost for as many queries as keys, before running.

        Args:
            num_keys: length of the sequence.
            is_causal: whether queries see only earlier keys.
            head_dim: width of keys, and of values.

        Returns:
            the cost.
        """
        pairs = sum(stage.slots(self.tile) for stage in self.stages)
        selection = sum(stage.selection_pairs(num_keys, self.tile, head_dim, is_causal) for stage in self.stages)
        gathered = 2 * pairs * head_dim * -(-num_keys // self.tile)
        memory_bytes = 4 * (gathered + 2 * num_keys * head_dim)
        return Cost(float(pairs), selection, exact_pairs(num_keys, is_causal), memory_bytes, self.complete)


def attend_lists(problem: Problem, selected: tuple[tuple[Tiling, Selection], ...]) -> Partial:
    """Compute attention over the lists of every tiling, and merge.

    Args:
        problem: the problem.
        selected: every tiling, and its lists.

    Returns:
        attention over the listed keys.
    """
    (k, v, table), partials = problem.storage(), ()
    for tiling, selection in selected:
        if selection.runs or len(selected) == 1:
            out, lse = list_attention(tiling.split(problem.q), k, v, selection, problem.scale, table)
            partials = tiling.beside(partials, out, lse)
    return merge(partials)


def _label_rows(tiles: Tiles, covered: CoveredKeys) -> tuple[Tensor | None, Tensor | None]:
    """Arrange the labels of a hash in the layout of the tiles: row labels and key labels."""
    if covered.labels is None:
        return None, None
    row_label = tiles.arrange(covered.labels.query[..., None].double())[..., 0].long()
    return row_label, covered.labels.key.flatten(0, 1)
