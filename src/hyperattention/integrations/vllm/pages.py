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
    """The cache of one kind of layers.

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
