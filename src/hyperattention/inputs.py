"""Checks of the public functions' arguments, and the errors they raise."""

import torch
from torch import Tensor

from hyperattention.random import SEED_LIMIT

# a dense mask of more pairs than this is refused: exact attention under it would take minutes and gigabytes
DENSE_PAIRS = 2**28
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**tensors: object) -> None:
    """Check that arguments are floating-point tensors.

    Args:
        **tensors: the arguments by name.

    Raises:
        TypeError: if an argument is not such a tensor; the message names the first one.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} is {kind}: it must be a floating-point tensor [batch, heads, tokens, head_dim]")


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, dropout_p: float, seed: int, check_finite: bool
) -> None:
    """Check queries, keys and values against one another.

    Args:
        query: queries.
        key: keys.
        value: values.
        enable_gqa: whether several query heads may share a kv head.
        dropout_p: share of weights dropped; only 0 is supported.
        seed: seed of every draw.
        check_finite: whether to look for NaN and infinity.

    Raises:
        ValueError: if shapes, devices, seed or values are wrong.
        TypeError: if dtypes are.
        NotImplementedError: if dropout is asked for.
    """
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if dropout_p:
        raise NotImplementedError(f"dropout_p={dropout_p}: dropout on attention weights is not supported; set dropout_p=0.0")
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"{shapes}: each must be [batch, heads, tokens, head_dim]; add the missing axes with unsqueeze")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: convert them to one dtype")
    if query.dtype not in _DTYPES:
        raise TypeError(f"dtype {query.dtype} is not supported: use float16, bfloat16, float32 or float64")
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value are on {query.device}, {key.device}, {value.device}: move them to one device"
        )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"{shapes}: batch sizes differ; expand the smaller batch")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"{shapes}: key and value must have the same heads and tokens")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"{shapes}: query and key must have the same head_dim")
    if not query.shape[1] or not key.shape[1] or not query.shape[3]:
        raise ValueError(f"{shapes}: heads and head_dim must be positive")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{shapes}: {query.shape[1]} query heads cannot share {key.shape[1]} kv heads evenly; give a multiple"
        )
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"{shapes}: head counts differ; pass enable_gqa=True to let query heads share kv heads")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed={seed!r}: it must be an integer in [0, 2**63)")
    if check_finite:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not bool(torch.isfinite(x).all()):
                count = int((~torch.isfinite(x)).sum())
                raise ValueError(
                    f"{name} holds {count} values that are NaN or infinite; check_finite=True refuses them; leave it out to "
                    "pass them on"
                )


def check_pages(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, starts: list[int], lengths: list[int]
) -> None:
    """Check requests whose keys and values lie in pages.

    Args:
        query: queries of all requests, ``[tokens, heads, head_dim]``.
        key_pages: pages of keys, ``[pages, kv_heads, page_size, head_dim]``.
        value_pages: pages of values.
        table: pages of each request, ``[sequences, pages_each]``.
        starts: where each request's queries begin, and where the last ends.
        lengths: keys of each request.

    Raises:
        ValueError: if shapes, devices, lengths or the table do not fit.
        TypeError: if dtypes are wrong.
    """
    check_tensors(query=query, key_pages=key_pages, value_pages=value_pages)
    shapes = f"query {tuple(query.shape)}, key_pages {tuple(key_pages.shape)}, value_pages {tuple(value_pages.shape)}"
    if query.ndim != 3 or not key_pages.ndim == value_pages.ndim == 4:
        raise ValueError(
            f"{shapes}: queries must be [tokens, heads, head_dim], pages [pages, kv_heads, page_size, head_dim]"
        )
    if not query.dtype == key_pages.dtype == value_pages.dtype or query.dtype not in _DTYPES:
        raise TypeError(
            f"query and pages are {query.dtype}, {key_pages.dtype}, {value_pages.dtype}: convert them to one of "
            f"{', '.join(str(x) for x in _DTYPES)}"
        )
    devices = {x.device for x in (query, key_pages, value_pages, table)}
    if len(devices) > 1:
        raise ValueError(f"query, pages and block_table are on {sorted(map(str, devices))}: move them to one device")
    if key_pages.shape[:3] != value_pages.shape[:3] or query.shape[2] != key_pages.shape[3]:
        raise ValueError(f"{shapes}: pages must agree in all but the last axis, queries and keys in the last")
    if not key_pages.shape[1] or query.shape[1] % key_pages.shape[1]:
        raise ValueError(
            f"{shapes}: {query.shape[1]} query heads cannot share {key_pages.shape[1]} kv heads evenly; give a multiple"
        )
    if table.ndim != 2 or table.is_floating_point():
        raise ValueError(f"block_table is {table.dtype} {tuple(table.shape)}: it must be integers [sequences, pages_each]")
    if not starts or starts[0] != 0 or starts[-1] != query.shape[0] or starts != sorted(starts):
        raise ValueError(f"query_start_loc is {starts}: it must rise from 0 to the number of tokens, {query.shape[0]}")
    if not len(starts) - 1 == len(lengths) == table.shape[0]:
        raise ValueError(
            f"query_start_loc names {len(starts) - 1} requests, seq_lens {len(lengths)}, block_table {table.shape[0]}: "
            "give one of each"
        )
    for s, (begin, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if not end - begin <= length <= table.shape[1] * key_pages.shape[2]:
            raise ValueError(
                f"request {s} has {end - begin} queries, {length} keys and {table.shape[1]} pages of {key_pages.shape[2]}: "
                "the keys must include those of the queries, and fit in the pages"
            )


def check_masks(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    *,
    is_causal: bool,
    causal_align: str,
) -> None:
    """Check the masks against the tensors they mask.

    Args:
        query: queries.
        key: keys.
        attn_mask: SDPA's mask.
        key_mask: mask of keys.
        is_causal: whether causality is asked for as well.
        causal_align: corner at which the diagonal starts, "upper_left" or "lower_right".

    Raises:
        ValueError: if a mask has the wrong shape or does not go with `is_causal`.
        TypeError: if a mask has the wrong dtype.
    """
    if causal_align not in ("upper_left", "lower_right"):
        raise ValueError(
            f"causal_align={causal_align!r}: it must be 'upper_left' (as SDPA) or 'lower_right' (chunks, decoding)"
        )
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask is {key_mask.dtype}: it must be boolean, True where a key may be attended to")
        if key_mask.shape != (key.shape[0], key.shape[2]):
            raise ValueError(
                f"key_mask has shape {tuple(key_mask.shape)} and must be [batch, keys] = {(key.shape[0], key.shape[2])}"
            )
    if attn_mask is None:
        return
    full = (*query.shape[:3], key.shape[2])
    shape = (1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape)
    if attn_mask.ndim > 4 or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, which does not broadcast to {full}: give each axis its size or 1"
        )
    if attn_mask.dtype != torch.bool and attn_mask.dtype != query.dtype:
        raise TypeError(f"attn_mask is {attn_mask.dtype}: it must be boolean or of the query's dtype, {query.dtype}")
    if _is_key_mask(attn_mask):
        return
    if is_causal:
        raise ValueError(
            "a dense attn_mask together with is_causal=True is ambiguous: fold causality into the mask, "
            "or pass padding as key_mask"
        )
    if full[2] * full[3] > DENSE_PAIRS:
        raise ValueError(
            f"a dense attn_mask over {full[2]} x {full[3]} pairs is beyond the limit of {DENSE_PAIRS}: use key_mask for "
            "padding, is_causal for causality, or varlen_attention for packed sequences"
        )


def _is_key_mask(attn_mask: Tensor) -> bool:
    shape = (1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape)
    return attn_mask.dtype == torch.bool and shape[1] == shape[2] == 1


def dense_mask(attn_mask: Tensor | None) -> Tensor | None:
    """Return the mask unless it is a key mask, which lists can express."""
    return None if attn_mask is None or _is_key_mask(attn_mask) else attn_mask


def key_mask_of(attn_mask: Tensor | None, key_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """Combine `key_mask` and an `attn_mask` of the form ``[batch, 1, 1, keys]``: ``[batch, keys]`` or None."""
    if attn_mask is None or not _is_key_mask(attn_mask):
        return key_mask
    alike = attn_mask.reshape(-1, attn_mask.shape[-1]).expand(key.shape[0], key.shape[2])
    return alike if key_mask is None else alike & key_mask


def autocast_device(x: Tensor) -> str:
    """Return the device type whose autocast applies to a tensor; the meta device has no autocast of its own."""
    return "cpu" if x.device.type == "meta" else x.device.type


def narrowed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the dtype of autocast if autocast is on, as SDPA does: every floating tensor except float64."""
    device = autocast_device(tensors[0])
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
