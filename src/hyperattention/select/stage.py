"""The contract of a stage, and what stages tell one another: the keys already taken."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.tiling import Tiles
from hyperattention.types import Labels, Runs, Selection


class LookAhead(IntEnum):
    """How far beyond a row the choice of its keys may look."""

    NOTHING = 0
    TILE = 1
    SEQUENCE = 2


@dataclass(frozen=True)
class CoveredKeys:
    """Keys that earlier stages took from each tile: later stages leave them alone, so that no key counts twice.

    Args:
        prefix: leading live keys taken from every tile.
        placed: how many keys of a tile are taken by their place, at most.
        gap: first and end of the keys around each tile that a window took, or None.
        near: keys directly before each tile that a window took.
        blocks: chosen blocks of earlier stages: sorted numbers of the blocks, and their size.
        labels: pairs of equal label are taken.
    """

    prefix: int = 0
    placed: int = 0
    gap: tuple[Int[Tensor, "batch tiles"], Int[Tensor, "batch tiles"]] | None = None
    near: int = 0
    blocks: tuple[tuple[Int[Tensor, "lists tiles _"], int], ...] = ()
    labels: Labels | None = None

    def with_blocks(self, blocks: Int[Tensor, "lists tiles slots"], block_size: int) -> "CoveredKeys":
        """Take chosen blocks as well."""
        return replace(self, blocks=(*self.blocks, (blocks, block_size)))

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Delimit what is left of each tile's keys, ``[batch, tiles]`` each: begin, hole begin, hole end, end."""
        end = tiles.visible_end
        begin = torch.minimum(torch.full_like(end, self.prefix), end)
        if self.gap is None:
            return begin, end, end, end
        hole_begin = self.gap[0].clamp(min=begin)
        hole_end = torch.maximum(self.gap[1], hole_begin).clamp(max=end)
        return begin, torch.minimum(hole_begin, end), torch.maximum(hole_end, hole_begin.clamp(max=end)), end

    def holds(self, index: Int[Tensor, "lists tiles slots"]) -> Tensor:
        """Return which keys lie in a chosen block."""
        held = torch.zeros_like(index, dtype=torch.bool)
        for blocks, size in self.blocks:
            block = index // size
            place = torch.searchsorted(blocks, block).clamp(max=blocks.shape[-1] - 1)
            held |= blocks.gather(-1, place) == block
        return held


@runtime_checkable
class Tiling(Protocol):
    """How queries are cut into tiles whose rows share a list of keys; a stage may bring one of its own."""

    def arrange(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles rows width"]:
        """Cut rows into tiles."""
        ...

    def restore(self, x: Tensor) -> Tensor:
        """Undo `arrange`, for rows of any width."""
        ...

    def split(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles group size width"]:
        """Cut rows into tiles, those of different heads apart, so that nothing need be copied."""
        ...

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`, for rows of any width."""
        ...


class Stage(ABC):
    """One step of a method: given what is taken, take more. Stages are ordered, and earlier stages win."""

    @property
    def complete(self) -> bool:
        """Whether this stage gives every key that is left an expected weight of one."""
        return False

    @property
    def looks_ahead(self) -> LookAhead:
        """How far beyond a row its list may depend on queries or keys."""
        return LookAhead.NOTHING

    @property
    def reads_keys(self) -> bool:
        """Whether the choice reads keys: if not, they are not brought together for it."""
        return True

    @property
    def reads_values(self) -> bool:
        """Whether the choice reads values."""
        return False

    @property
    def tells_error(self) -> bool:
        """Whether a standard error can be told from its slots: it draws nothing, or `Runs.sample` says how it drew."""
        return True

    @abstractmethod
    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Choose keys for every tile.

        Args:
            tiles: the tiled problem.
            covered: keys of earlier stages.

        Returns:
            the runs, and what is taken after them.
        """

    def select_apart(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[tuple[Tiling, Selection], ...], CoveredKeys]:
        """Choose keys for tiles of its own: for a stage whose neighbours are not neighbours in position.

        Args:
            tiles: the problem tiled by position.
            covered: keys of earlier stages.

        Returns:
            own tilings with their lists, none unless a stage says otherwise, and what is taken after them.
        """
        return (), covered

    @property
    def by_place(self) -> bool:
        """Whether the keys taken are known by position alone, as those of sinks and of a window are."""
        return False

    def check_after(self, earlier: "tuple[Stage, ...]") -> None:
        """Refuse to follow stages whose keys this one could not leave alone.

        Args:
            earlier: the stages before this one.

        Raises:
            ValueError: if draws came before, which stand for every key left, or this stage goes by place and blocks came
                before, or there are two of its kind by place.
        """
        for stage in earlier:
            name, before = type(self).__name__, type(stage).__name__
            if stage.complete:
                raise ValueError(
                    f"{name} after {before} would count keys twice: draws stand for all that is left, so put them last"
                )
            if self.by_place and not stage.by_place and not stage.reorders:
                raise ValueError(f"{name} after {before} would count keys twice: put {name} first")
            if self.by_place and type(self) is type(stage):
                raise ValueError(f"two {name} stages would count keys twice: one larger {name} holds both")

    @property
    def reorders(self) -> bool:
        """Whether the stage has a tiling of its own, whose pairs later stages skip by label."""
        return False

    @abstractmethod
    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile of `tile` positions, masked ones included."""

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count query-key products spent on choosing, per query, in units of one product of `head_dim` numbers."""
        return 0.0
