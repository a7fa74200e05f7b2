"""The base class of every stage, and the keys taken by earlier stages, which one stage passes to the next."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.tiling import Tiles
from hyperattention.types import Labels, Partial, Runs, Selection


class LookAhead(IntEnum):
    """How far beyond a row the choice of its keys may depend on queries or keys."""

    NOTHING = 0
    TILE = 1
    SEQUENCE = 2


@dataclass(frozen=True)
class Edges:
    """Edges of each tile's remaining keys, as kernels read them.

    Args:
        of_tile: begin, hole begin, hole end, end, and the end of the keys that all queries of the tile see.
        begin: the first of these, contiguous.
        end: the fourth.
    """

    of_tile: Int[Tensor, "lists tiles 5"]
    begin: Int[Tensor, "lists tiles"]
    end: Int[Tensor, "lists tiles"]


@dataclass(frozen=True)
class CoveredKeys:
    """Keys that earlier stages took for each tile: later stages skip them, so that no key counts twice.

    Args:
        prefix: number of leading live keys taken for every tile.
        placed: largest number of keys of a tile that are taken by position.
        gap: first and end of the keys around each tile that a window took, or None.
        near: number of keys directly before each tile that a window took.
        blocks: blocks of earlier stages: sorted indices of the blocks, and their size.
        labels: pairs of equal label are taken.
        edges: the edges that `bounds` computes, where a kernel has computed them.
    """

    prefix: int = 0
    placed: int = 0
    gap: tuple[Int[Tensor, "batch tiles"], Int[Tensor, "batch tiles"]] | None = None
    near: int = 0
    blocks: tuple[tuple[Int[Tensor, "lists tiles _"], int], ...] = ()
    labels: Labels | None = None
    edges: Edges | None = None

    def with_blocks(self, blocks: Int[Tensor, "lists tiles slots"], block_size: int) -> "CoveredKeys":
        """Add chosen blocks to the taken keys."""
        return replace(self, blocks=(*self.blocks, (blocks, block_size)))

    def bounds(self, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the edges of each tile's remaining keys, ``[batch, tiles]`` each: begin, hole begin, hole end, end."""
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
    """A partition of queries into tiles whose rows share a list of keys; a stage may have its own tiling."""

    def arrange(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles rows width"]:
        """Cut rows into tiles."""
        ...

    def restore(self, x: Tensor) -> Tensor:
        """Undo `arrange`, for rows of any width."""
        ...

    def split(self, x: Float[Tensor, "batch heads queries width"]) -> Float[Tensor, "lists tiles group size width"]:
        """Cut rows into tiles with separate heads, so that no copy is needed."""
        ...

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`, for rows of any width."""
        ...

    def beside(self, earlier: tuple[Partial, ...], out: Tensor, lse: Tensor) -> tuple[Partial, ...]:
        """Undo `split` for attention over the lists, and put it behind what is to be merged with it."""
        ...


class Stage(ABC):
    """One step of a method: it takes keys that earlier stages did not take."""

    @property
    def complete(self) -> bool:
        """Whether this stage gives every remaining key an expected weight of one."""
        return False

    @property
    def looks_ahead(self) -> LookAhead:
        """How far beyond a row the row's list may depend on queries or keys."""
        return LookAhead.NOTHING

    @property
    def reads_keys(self) -> bool:
        """Whether the choice reads keys; if not, keys in pages are not copied for the choice."""
        return True

    @property
    def reads_values(self) -> bool:
        """Whether the choice reads values."""
        return False

    @property
    def tells_error(self) -> bool:
        """Whether a standard error can be estimated from the slots: no draws, or `Runs.sample` describes them."""
        return True

    @abstractmethod
    def select(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[Runs, ...], CoveredKeys]:
        """Choose keys for every tile.

        Args:
            tiles: the tiled problem.
            covered: keys of earlier stages.

        Returns:
            the runs, and the keys taken including them.
        """

    def select_apart(self, tiles: Tiles, covered: CoveredKeys) -> tuple[tuple[tuple[Tiling, Selection], ...], CoveredKeys]:
        """Choose keys for separate tiles, in a stage whose tiles are not consecutive positions.

        Args:
            tiles: the problem tiled by position.
            covered: keys of earlier stages.

        Returns:
            separate tilings with their lists (none by default), and the keys taken including them.
        """
        return (), covered

    @property
    def by_place(self) -> bool:
        """Whether the keys taken depend only on position, as for sinks and a window."""
        return False

    def check_after(self, earlier: "tuple[Stage, ...]") -> None:
        """Check that this stage can skip the keys of all earlier stages.

        Args:
            earlier: the stages before this one.

        Raises:
            ValueError: if an earlier stage draws, because draws represent every remaining key; if this stage takes keys by
                position and blocks were taken before; or if two stages of this kind take keys by position.
        """
        for stage in earlier:
            name, before = type(self).__name__, type(stage).__name__
            if stage.complete:
                raise ValueError(
                    f"{name} after {before} would count keys twice: draws represent all remaining keys, so put them last"
                )
            if self.by_place and not stage.by_place and not stage.reorders:
                raise ValueError(f"{name} after {before} would count keys twice: put {name} first")
            if self.by_place and type(self) is type(stage):
                raise ValueError(f"two {name} stages would count keys twice: use one larger {name}")

    @property
    def reorders(self) -> bool:
        """Whether the stage has a separate tiling, whose pairs later stages skip by label."""
        return False

    @abstractmethod
    def slots(self, tile: int) -> int:
        """Count the keys listed for each tile of `tile` positions, masked ones included."""

    def selection_pairs(self, num_keys: int, tile: int, head_dim: int, causal: bool) -> float:
        """Count query-key products spent on choosing, per query, in units of one product of `head_dim` numbers."""
        return 0.0
