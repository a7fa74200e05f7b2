"""The requests of one call over pages: where each one's queries and keys are."""

from dataclasses import dataclass

from torch import Tensor

from hyperattention.inputs import check_pages, check_tensors, narrowed
from hyperattention.problem import Pages, Problem
from hyperattention.transforms import refuse_transforms, scale_of


@dataclass(frozen=True)
class Requests:
    """The requests of one call, checked.

    Args:
        query: queries of all requests, end to end.
        pages: keys, values and the table of pages.
        starts: where each request's queries begin, and where the last ends.
        lengths: keys of each request.
        scale: factor of the scores.
        seed: seed of every draw.
        layer: layer of the model.
        first_kv_head: number of the first kv head among those of the model.
    """

    query: Tensor
    pages: Pages
    starts: list[int]
    lengths: list[int]
    scale: float
    seed: int
    layer: int
    first_kv_head: int

    def queries(self, number: int) -> Tensor:
        """Cut out the queries of a request: ``[queries, heads, head_dim]``."""
        return self.query[self.starts[number] : self.starts[number + 1]]

    @property
    def heads(self) -> tuple[int, ...] | None:
        """Numbers of the kv heads, where they do not begin at 0."""
        count = self.pages.key.shape[1]
        return tuple(range(self.first_kv_head, self.first_kv_head + count)) if self.first_kv_head else None

    def problem(self, number: int, *, keys: bool, values: bool, in_pages: bool) -> Problem:
        """Bring one request into normal form; only tensors that are read outside the pages are copied.

        Args:
            number: number of the request.
            keys: whether keys are read outside the pages.
            values: whether values are.
            in_pages: whether kernels read the pages.

        Returns:
            the problem.
        """
        length, query = self.lengths[number], self.queries(number)

        def rows(x: Tensor, read: bool) -> Tensor:
            return self.pages.rows(x, number, length) if read else x.new_zeros(1).expand(1, x.shape[1], length, x.shape[3])

        table = self.pages.table[number : number + 1]
        return Problem(
            q=query.transpose(0, 1)[None],
            k=rows(self.pages.key, keys),
            v=rows(self.pages.value, values),
            scale=self.scale,
            causal=True,
            offset=length - query.shape[0],
            seed=self.seed,
            layer=self.layer,
            heads=self.heads,
            stored=Pages(self.pages.key, self.pages.value, table) if in_pages else None,
        )


def checked_requests(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
    scale: float | None, seed: int, layer: int, first_kv_head: int,
) -> Requests:  # fmt: skip
    """Check the arguments of a call over pages.

    Args:
        query: queries. All arguments are as for `paged_attention`.
        key_pages: the cache of keys.
        value_pages: the cache of values.
        block_table: the pages of each request.
        query_start_loc: where each request's queries begin.
        seq_lens: keys of each request.
        scale: factor of the scores.
        seed: seed of every draw.
        layer: layer of the model.
        first_kv_head: number of the first kv head.

    Returns:
        the requests.

    Raises:
        ValueError: if the number of the first head is negative; other arguments that do not fit raise errors as well.
    """
    check_tensors(query=query, key_pages=key_pages, value_pages=value_pages)
    query, key_pages, value_pages = narrowed(query, key_pages, value_pages)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    check_pages(query, key_pages, value_pages, block_table, starts, lengths)
    refuse_transforms("attention over pages", query, key_pages, value_pages)
    scale = scale_of(scale, query.shape[2])
    if first_kv_head < 0:
        raise ValueError(f"first_kv_head is {first_kv_head}: it must be at least 0, the number of the first head held here")
    return Requests(query, Pages(key_pages, value_pages, block_table), starts, lengths, scale, seed, layer, first_kv_head)
