"""The side table of a layer: a summary of every page of keys, by the number of the page in vLLM's cache."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.cache.page_rank import PageRank


@dataclass(frozen=True)
class PageSummaries:
    """Summaries of all pages of the cache of one layer.

    A block of vLLM holds a whole number of pages. A summary is a function of the keys that are in the cache at the moment
    when the last key of its page is written, whichever request wrote them. So it is right for every request that reads the
    page, and it is renewed when the block is used again. Pages that are not full are never ranked.

    Args:
        by: summarises pages.
        page: number of keys in a page.
        held: the table.
    """

    by: PageRank
    page: int
    held: Float[Tensor, "kv_heads blocks pages_each width"]

    @staticmethod
    def empty(
        by: PageRank, page: int, *, blocks: int, block_size: int, heads: int, head_dim: int, like: Tensor
    ) -> "PageSummaries":
        """Allocate a table.

        Args:
            by: summarises pages.
            page: number of keys in a page.
            blocks: number of blocks of the cache.
            block_size: number of keys in a block, a multiple of `page`.
            heads: number of kv heads.
            head_dim: width of keys.
            like: any tensor with the dtype and the device of the keys.

        Returns:
            a table of zeros.
        """
        return PageSummaries(by, page, like.new_zeros(heads, blocks, block_size // page, width_of(by, head_dim)))

    @property
    def memory_bytes(self) -> int:
        """Bytes of the table."""
        return self.held.numel() * self.held.element_size()

    def renew(self, keys: Float[Tensor, "blocks kv_heads block_size head_dim"], filled: Int[Tensor, " pages"]) -> None:
        """Summarise pages again from the keys that the cache holds now.

        Args:
            keys: the cache of keys.
            filled: numbers of the pages, as `filled_pages` gives them.
        """
        if not len(filled):
            return
        each = self.held.shape[2]
        block, place = filled // each, filled % each
        pages = keys.unflatten(2, (each, self.page))[block, :, place]  # [pages, kv_heads, page, head_dim]
        rows = self.by.summarise(pages.transpose(0, 1)[None])[0]  # [kv_heads, pages, width]
        self.held.flatten(1, 2).index_copy_(1, filled, rows)

    def of_blocks(self, blocks: Int[Tensor, " used"]) -> Float[Tensor, "1 kv_heads pages width"]:
        """Read the summaries of a request.

        Args:
            blocks: its blocks, in order.

        Returns:
            the summaries of all pages of these blocks, in the order of the keys.
        """
        return self.held.index_select(1, blocks).flatten(1, 2)[None]


def width_of(by: PageRank, head_dim: int) -> int:
    """Return the number of values in a summary.

    Args:
        by: summarises pages.
        head_dim: width of keys.

    Returns:
        the number.
    """
    return by.summarise(torch.zeros(1, 1, 1, 1, head_dim, dtype=torch.float32, device="cpu")).shape[-1]


def filled_pages(slots: Int[Tensor, " tokens"], page: int) -> Int[Tensor, " pages"]:
    """List the pages that a step fills: those whose last key it writes.

    Args:
        slots: the slot in the cache of every token of the step; negative for padding.
        page: number of keys in a page.

    Returns:
        numbers of pages; page p holds the slots from p * page on.
    """
    slots = slots.long()
    return slots[(slots >= 0) & (slots % page == page - 1)] // page
