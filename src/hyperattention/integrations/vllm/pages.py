"""Reading of vLLM's cache as pages of keys and pages of values."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class KeyOrder(Enum):
    """How a page holds its keys: vLLM's kernels for a CPU store the numbers of one coordinate next to one another."""

    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class CachePages:
    """The cache of one kind of layers. Pages are vLLM's blocks here, and parts of them what `TopPages` calls pages.

    Args:
        head_dim: width of keys and values.
        order: how a page holds its keys; None where each key is beside its value, as on GPUs.
    """

    head_dim: int
    order: KeyOrder | None

    def views(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pages of keys and of values, ``[pages, kv_heads, page_size, head_dim]``, without a copy.

        Args:
            cache: the cache of a layer, ``[pages, kv_heads, page_size, 2 * head_dim]``.

        Returns:
            views of it.
        """
        if self.order is None:
            key, value = cache.split(self.head_dim, dim=-1)
            return key, value
        pages, heads, size, _ = cache.shape
        # a page of a head is two blocks: all its keys, then all its values
        key, value = cache.view(pages, heads, 2 * size, self.head_dim).chunk(2, dim=2)
        if self.order is KeyOrder.COLUMNS:
            key = key.as_strided(key.shape, (key.stride(0), key.stride(1), 1, size), key.storage_offset())
        return key, value

    def of_request(self, cache: Tensor, table: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return pages with the keys of one request, and their table; columns are copied, because rows are read faster.

        Args:
            cache: the cache of a layer.
            table: pages of the request, in order.
            keys: number of keys of the request.

        Returns:
            pages of keys, pages of values, and the table of one request.
        """
        key, value = self.views(cache)
        used = table[: -(-keys // cache.shape[2])]
        if self.order is not KeyOrder.COLUMNS:
            return key, value, used[None]
        place = used.long()
        every = torch.arange(len(used), dtype=torch.int64, device=used.device)
        return key[place].contiguous(), value[place], every[None]

    def gather(self, cache: Tensor, block: Tensor, part: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Copy parts of pages, each kv head its own.

        Args:
            cache: the cache of a layer.
            block: pages, ``[kv_heads, parts]``.
            part: which part of its page, ``[kv_heads, parts]``.
            size: number of keys in a part; it divides those of a page.

        Returns:
            keys and values, ``[kv_heads, parts * size, head_dim]``, end to end.
        """
        heads, keys, width = cache.shape[1], cache.shape[2], self.head_dim
        head = torch.arange(heads, dtype=torch.int64, device=cache.device)[:, None]
        if self.order is None:
            key, value = (x.unflatten(2, (-1, size))[block, head, part].flatten(1, 2) for x in self.views(cache))
            return key, value
        # whole runs of memory are copied several times as fast as single numbers: a part of values is one, and of keys one
        # or, where the numbers of a coordinate are beside one another, one for each coordinate
        parts, begin = keys // size, (block * heads + head) * (2 * keys // size) + part
        held = cache.view(-1, size * width)
        value = held.index_select(0, (begin + parts).flatten()).view(heads, -1, width)
        if self.order is KeyOrder.ROWS:
            return held.index_select(0, begin.flatten()).view(heads, -1, width), value
        column = torch.arange(0, width * parts, parts, dtype=torch.int64, device=cache.device)
        first = (begin - part) * width + part
        pieces = (first[:, None] + column[:, None]).flatten()  # [kv_heads, head_dim, parts]
        return cache.view(-1, size).index_select(0, pieces).view(heads, width, -1).transpose(1, 2), value


def find_order(written: Tensor, key: Tensor) -> KeyOrder | None:
    """Find out how a kernel has stored keys.

    Args:
        written: the keys' half of one page, ``[kv_heads, page_size, head_dim]``, after a kernel wrote all its keys.
        key: these keys, ``[page_size, kv_heads, head_dim]``.

    Returns:
        the order; None if it is neither.
    """
    heads, size, head_dim = written.shape
    by_head = key.transpose(0, 1)
    if torch.equal(written, by_head):
        return KeyOrder.ROWS
    columns = written.reshape(heads, head_dim, size).transpose(1, 2)
    return KeyOrder.COLUMNS if torch.equal(columns, by_head) else None
