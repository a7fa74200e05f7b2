"""Launch arguments of the Triton list kernels: keys in rows or pages, and the groups of a selection as tuples."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hyperattention.kernels.list.reference import Lists


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and all of its arguments by name.

    Args:
        kernel: the kernel.
        grid: programs along each axis.
        arguments: tensors, numbers, constants and options of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def run(self) -> None:
        """Launch the kernel on the device of its tensors, even if another device is current."""
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments)

    def compile(self) -> Any:
        """Compile the kernel for the active target without a launch.

        Returns:
            the compiled kernel.
        """
        return self.kernel.warmup(**self.arguments, grid=self.grid)


@dataclass(frozen=True)
class StoredRows:
    """Keys or values in memory: consecutive rows, or pages with a table.

    Args:
        data: the tensor, its last axis contiguous.
        strides: numbers from one row or page to the next, from head to head within a page, and from key to key.
        keys: number of keys in a row.
        heads: number of heads in a page.
        page: number of keys in a page, 0 without pages.
        pages: largest number of pages of a sequence.
        table: pages of each sequence; ignored without pages.
    """

    data: Tensor
    strides: tuple[int, int, int]
    keys: int
    heads: int
    page: int
    pages: int
    table: Tensor


def store_of(x: Tensor, table: Tensor | None) -> StoredRows:
    """Describe keys or values as kernels address them.

    Args:
        x: ``[key_rows, keys, width]``, or ``[pages, kv_heads, page_size, width]`` with a table.
        table: pages of each sequence, ``[sequences, pages]``.

    Returns:
        the description; copied only if the last axis is not contiguous.
    """
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    if table is None:
        return StoredRows(x, (x.stride(0), 0, x.stride(1)), x.shape[1], 1, 0, 0, x)
    table = table.contiguous()
    return StoredRows(
        x,
        (x.stride(0), x.stride(1), x.stride(2)),
        table.shape[1] * x.shape[2],
        x.shape[1],
        x.shape[2],
        table.shape[1],
        table,
    )


def groups_of(lists: Lists, block: int) -> dict[str, Any]:
    """Return the groups of a selection as kernel arguments: tensors and counts in tuples, compile-time values as constants.

    Args:
        lists: the selection.
        block: slots processed at once, fewer in groups with fewer slots.

    Returns:
        arguments by name.
    """
    counts = [first.shape[-1] for first in lists.first]
    slots = [count * size for count, size in zip(counts, lists.size, strict=True)]
    return {
        "firsts": tuple(x.contiguous() for x in lists.first),
        "weights": tuple(x.contiguous() for x in lists.log_weight),
        "lows": tuple(x.contiguous() for x in lists.low),
        "highs": tuple(x.contiguous() for x in lists.high),
        "holes": tuple(x.contiguous() for x in lists.hole),
        "slots": tuple(slots),
        # a single run may have any length: its kernel supports every length
        "RUNS": tuple(0 if count == 1 else size for count, size in zip(counts, lists.size, strict=True)),
        "BLOCKS": tuple(max(16, min(block, triton.next_power_of_2(max(1, count)))) for count in slots),
        "HOLED": tuple(hole.numel() > 0 for hole in lists.hole),
        "CAUSAL": tuple(lists.causal),
        "LABELLED": tuple(lists.labelled),
    }


def row_tests_of(lists: Lists) -> dict[str, Any]:
    """Return the tensors for the tests of pairs; for a test that is absent the limit is passed, and not read.

    Args:
        lists: the selection.

    Returns:
        arguments by name.
    """
    limit = lists.row_limit.contiguous()

    def given(x: Tensor | None) -> Tensor:
        return limit if x is None else x.contiguous()

    return {
        "key_row_ptr": lists.key_row.contiguous(),
        "limit_ptr": limit,
        "row_label_ptr": given(lists.row_label),
        "key_label_ptr": given(lists.key_label),
        "gap_low_ptr": given(lists.gap_low),
        "gap_high_ptr": given(lists.gap_high),
        "GAP": lists.gap_low is not None,
        "LABELS": lists.row_label is not None,
    }


def labels_in_a_row(lists: Lists) -> int:
    """Count the labels of each row of keys: one per key, but for keys in pages the last page may be partly empty."""
    return 0 if lists.key_label is None else lists.key_label.shape[1]


def precision_of(x: Tensor, precise: bool = False) -> str:
    """Return the precision of products of float32 operands.

    Args:
        x: queries.
        precise: whether float32 precision is wanted even if torch's settings allow less.

    Returns:
        three TF32 products, whose sum has float32 precision except for the last one or two bits; or one TF32 product of
        eleven bits, if torch's settings allow it.
    """
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    rough = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if rough and not precise else "tf32x3"


def by_head(x: Tensor) -> Tensor:
    """Order rows of tiles by head: ``[lists, tiles, group, size, ...]`` to ``[lists, group, tiles, size, ...]``.

    Args:
        x: rows of tiles.

    Returns:
        the rows, contiguous; not copied if a head's positions are consecutive in memory, as in the layout of queries.
    """
    return x.transpose(1, 2).contiguous()
