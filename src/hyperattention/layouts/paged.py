"""Attention over keys and values in pages, as serving engines keep them: requests of unequal lengths in one call."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.inputs import autocast_device, check_method, check_pages, check_tensors, narrowed
from hyperattention.layouts.ragged import Packed, ragged_attention
from hyperattention.methods.base import Approach
from hyperattention.methods.default import default_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.problem import Pages, Problem
from hyperattention.transforms import refuse_transforms, scale_of


def paged_attention(
    query: Float[Tensor, "tokens heads head_dim"],
    key_pages: Float[Tensor, "pages kv_heads page_size head_dim"],
    value_pages: Float[Tensor, "pages kv_heads page_size value_dim"],
    block_table: Int[Tensor, "sequences pages_each"],
    query_start_loc: Int[Tensor, " sequences_plus_one"],
    seq_lens: Int[Tensor, " sequences"],
    *,
    scale: float | None = None,
    method: Approach | None = None,
    seed: int = 0,
    layer: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend causally within each of several requests, whose keys, those of this step included, are already in their pages.

    The queries of request s are its last ones: decoding has one, a chunk of a prompt several. Requests served exactly share
    one launch, which reads the pages where they lie. For a request served by a method, the method chooses, and the same
    kernel reads what it listed from the pages; keys are copied out of them only if the method's choice reads keys.
    Inference only: pages have no gradient. Arguments that do not fit raise ValueError or TypeError; the message says what to
    do.

    Args:
        query: queries of all requests, end to end.
        key_pages: the cache of keys, of any strides.
        value_pages: the cache of values.
        block_table: the pages of each request, in order; entries past its last page may hold anything.
        query_start_loc: where each request's queries begin, and where the last ends; on a device the host waits for it.
        seq_lens: keys of each request, those of its queries included; on a device the host waits for it.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        method: what runs for each request; None decides by its own length.
        seed: seed of every draw.
        layer: layer of the model.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        out ``[tokens, heads, value_dim]``, or out and lse ``[tokens, heads]``.

    Raises:
        NotImplementedError: if `method` is neither exact nor a list of stages.
    """
    check_tensors(query=query, key_pages=key_pages, value_pages=value_pages)
    query, key_pages, value_pages = narrowed(query, key_pages, value_pages)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    check_pages(query, key_pages, value_pages, block_table, starts, lengths)
    if method is not None:
        check_method(method)
    scale = scale_of(scale, query.shape[2])
    refuse_transforms("attention over pages", query, key_pages, value_pages)
    pages, kv_heads = Pages(key_pages, value_pages, block_table), key_pages.shape[1]
    out = query.new_zeros((*query.shape[:2], value_pages.shape[3]))
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    exact = []
    with torch.no_grad(), torch.autocast(autocast_device(query), enabled=False):
        for s, (begin, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
            runs = default_method(length, num_queries=end - begin, device=query.device) if method is None else method
            if isinstance(runs, Exact):
                exact.append(s)
            elif isinstance(runs, Method):
                part = runs.attend(_problem(pages, s, length, query[begin:end], runs, scale, seed, layer))
                out[begin:end], lse[begin:end] = part.out[0].transpose(0, 1), part.lse[0].transpose(0, 1)
            else:
                raise NotImplementedError(f"{runs!r} does not read pages: use Exact(), or a Method of stages")
        if exact:
            count = [starts[s + 1] - starts[s] for s in exact]
            keys = [lengths[s] for s in exact]
            offset = [k - c for k, c in zip(keys, count, strict=True)]
            packed = Packed([starts[s] for s in exact], count, keys, offset, causal=True)
            parts = ragged_attention(
                query, key_pages, value_pages, packed, scale, table=block_table[exact], kv_heads=kv_heads
            )
            rows = torch.cat([torch.arange(starts[s], starts[s + 1], dtype=torch.int64, device="cpu") for s in exact]).to(
                query.device
            )
            out.index_copy_(0, rows, parts[0])
            lse.index_copy_(0, rows, parts[1])
    return (out, lse) if return_lse else out


def _problem(
    pages: Pages, sequence: int, length: int, query: Tensor, method: Method, scale: float, seed: int, layer: int
) -> Problem:
    """Bring one request into normal form, with copies only of what the method's choice reads."""

    def rows(x: Tensor, read: bool) -> Tensor:
        return pages.rows(x, sequence, length) if read else x.new_zeros(1).expand(1, x.shape[1], length, x.shape[3])

    k, v = rows(pages.key, method.reads_keys), rows(pages.value, method.reads_values)
    stored = Pages(pages.key, pages.value, pages.table[sequence : sequence + 1])
    offset = length - query.shape[0]
    return Problem(query.transpose(0, 1)[None], k, v, scale, True, offset, None, seed, layer, stored)
