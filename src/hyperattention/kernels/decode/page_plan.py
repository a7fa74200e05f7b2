"""What a decoding step over pages reads: sinks, chosen pages and the window."""

from dataclasses import dataclass

# most pages whose scores fit the registers of a program
MOST_PAGES = 16_384
# fewest that a kernel is compiled for
_FEWEST_PAGES = 1024


@dataclass(frozen=True)
class PagePlan:
    """The keys that a step reads beside its chosen pages, and how many pages it chooses.

    Args:
        page: keys in a page.
        sinks: first keys of each row that are always read.
        recent: first key of the window, a multiple of `page`.
        seen: number of all keys.
        num: number of pages to choose.
    """

    page: int
    sinks: int
    recent: int
    seen: int
    num: int

    @property
    def slots(self) -> int:
        """Keys that a query reads, empty slots included."""
        return self.num * self.page + self.seen - self.recent + self.sinks


def most_pages(pages: int) -> int:
    """Return the number of pages that a kernel is compiled for, so that few kernels serve all lengths.

    Args:
        pages: number of pages, at most `MOST_PAGES`.

    Returns:
        a power of two.
    """
    return max(_FEWEST_PAGES, 1 << max(0, pages - 1).bit_length())
