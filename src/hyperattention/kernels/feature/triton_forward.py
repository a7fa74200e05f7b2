"""The feature kernel in Triton, forward: rows read the state of the chunks before theirs, and weigh pairs within theirs.

`reference` is the specification. The kernel serves rows that see all keys, and causal rows; other limits need other states.
Operands of products stay in the dtype of the input, states too; sums and masses are float32.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.feature.triton_states import Cut, Side, States, padded, states_of
from hyperattention.kernels.launch import Launch, precision_of

# numbers of expanded features that a program multiplies at once
_EXPANDED = 128


def cut_of(features: int, width: int, itemsize: int, power: int) -> Cut:
    """Choose sizes of programs (tests compile them).

    Args:
        features: number of features.
        width: numbers of a value.
        itemsize: bytes of each.
        power: of products of features.

    Returns:
        the sizes.
    """
    wide = max(padded(features), padded(width))
    piece = 1 if power == 1 else max(1, _EXPANDED // padded(features))
    # states of squares are large: fewer of them
    chunk = 128 if power == 1 else 512
    if itemsize == 4:
        return Cut(chunk, 32, 32, piece, 4, 1)
    return Cut(chunk, 128, 64, piece, 8, 2) if wide <= 64 else Cut(chunk, 64, 32, piece, 8, 2)


@triton.jit
def _forward_kernel(
    query_ptr, query_log_ptr, base_ptr, key_ptr, value_ptr, log_ptr, state_ptr, mass_ptr, top_ptr, out_ptr, lse_ptr,
    queries, keys, shift, first_tile, tiles, chunks, group,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, POWER: tl.constexpr,
    CAUSAL: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    start = (first_tile + tl.program_id(0) % tiles) * TILE
    owner = head // group
    feature, column = tl.arange(0, WIDE), tl.arange(0, VALUE_WIDE)
    position = start + tl.arange(0, TILE)
    index = position - shift
    live = (index >= 0) & (index < queries)
    row = head * queries + index
    query = tl.load(
        query_ptr + row[:, None] * FEATURES + feature[None, :], mask=live[:, None] & (feature[None, :] < FEATURES), other=0.0
    )  # [TILE, WIDE]
    base = tl.load(base_ptr + owner * queries + index, mask=live, other=0.0)
    # chunks before the row's own; all of them if nothing is hidden
    entry = chunks
    if CAUSAL:
        entry = tl.minimum(tl.maximum(start, 0) // CHUNK, chunks)
    at = (owner * (chunks + 1) + entry) * (tl.cdiv(FEATURES, PIECE) * PIECE * WIDE if POWER == 2 else WIDE)
    total = tl.zeros([TILE, VALUE_WIDE], tl.float32)
    denominator = tl.zeros([TILE], tl.float32)
    if POWER == 2:
        for piece in range(0, tl.cdiv(FEATURES, PIECE)):
            number, pair = piece * PIECE + tl.arange(0, PIECE), piece * PIECE * WIDE + tl.arange(0, PIECE * WIDE)
            others = tl.load(
                query_ptr + row[:, None] * FEATURES + number[None, :],
                mask=live[:, None] & (number[None, :] < FEATURES),
                other=0.0,
            )  # [TILE, PIECE]
            pairs = tl.reshape(others.to(tl.float32)[:, :, None] * query.to(tl.float32)[:, None, :], [TILE, PIECE * WIDE])
            state = tl.load(state_ptr + (at + pair)[:, None] * VALUE_WIDE + column[None, :])
            total = tl.dot(pairs.to(query.dtype), state, total, input_precision=PRECISION)
            denominator += tl.sum(pairs * tl.load(mass_ptr + at + pair)[None, :], 1)
    else:
        state = tl.load(state_ptr + (at + feature)[:, None] * VALUE_WIDE + column[None, :])
        total = tl.dot(query, state, total, input_precision=PRECISION)
        denominator += tl.sum(query.to(tl.float32) * tl.load(mass_ptr + at + feature)[None, :], 1)
    fall = tl.exp(tl.minimum(tl.load(top_ptr + owner * (chunks + 1) + entry) - base, 0.0))
    total, denominator = total * fall[:, None], denominator * fall
    if CAUSAL:
        end = tl.where(start < 0, 0, tl.minimum(start + TILE, keys))
        for block in range(entry * CHUNK, end, BLOCK):
            key_index = block + tl.arange(0, BLOCK)
            near = key_index < keys
            place = owner * keys + key_index
            key = tl.load(
                key_ptr + place[None, :] * FEATURES + feature[:, None],
                mask=near[None, :] & (feature[:, None] < FEATURES),
                other=0.0,
            )  # [WIDE, BLOCK]
            value = tl.load(
                value_ptr + place[:, None] * WIDTH + column[None, :],
                mask=near[:, None] & (column[None, :] < WIDTH),
                other=0.0,
            )  # [BLOCK, VALUE_WIDE]
            log_scale = tl.load(log_ptr + place, mask=near, other=-float("inf"))
            weight = tl.dot(query, key, input_precision=PRECISION)
            if POWER == 2:
                weight = weight * weight
            visible = (key_index[None, :] <= position[:, None]) & near[None, :]
            weight = tl.where(visible, weight * tl.exp(tl.minimum(log_scale[None, :] - base[:, None], 0.0)), 0.0)
            denominator += tl.sum(weight, 1)
            total = tl.dot(weight.to(value.dtype), value, total, input_precision=PRECISION)
    # features of either sign can cancel; a sum below the smallest normal number counts as 0. NaN stays NaN
    query_log = tl.load(query_log_ptr + row, mask=live, other=0.0)
    empty = (denominator < TINY) | (query_log == -float("inf"))
    lse = tl.where(empty, -float("inf"), query_log + base + tl.log(tl.where(empty, 1.0, denominator)))
    total = tl.where(empty[:, None], 0.0, total / tl.where(empty, 1.0, denominator)[:, None])
    tl.store(
        out_ptr + row[:, None] * WIDTH + column[None, :], total.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (column[None, :] < WIDTH),
    )  # fmt: skip
    tl.store(lse_ptr + row, lse, mask=live)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_log_scale: Tensor,
    key_log_scale: Tensor,
    offset: int | None,
    power: int,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention with weights that are powers of products of features: `reference.forward` on a GPU.

    Args:
        query: features of the queries, ``[batch, heads, queries, features]``.
        key: features of the keys, ``[batch, kv_heads, keys, features]``.
        value: ``[batch, kv_heads, keys, value_dim]``.
        query_log_scale: a, ``[batch, heads, queries]``.
        key_log_scale: b, ``[batch, kv_heads, keys]``.
        offset: position of the first query, whose rows see the keys up to their own position; None: rows see all keys.
        power: 1 or 2.
        cut: sizes of programs; None uses `cut_of`.

    Returns:
        out and lse, as `reference.forward`.
    """
    out, lse = value.new_empty((*query.shape[:3], value.shape[3])), query.new_empty(query.shape[:3], dtype=torch.float32)
    if not (query.numel() and key.numel() and value.numel()):
        return out.zero_(), lse.fill_(-torch.inf)
    cut = cut or cut_of(query.shape[3], value.shape[3], query.element_size(), power)
    keys, group = keys_side(key, value, key_log_scale), query.shape[1] // key.shape[1]
    states = states_of(keys, group=1, cut=cut, power=power, reverse=False)
    rows = query.flatten(0, 1).contiguous(), query_log_scale.flatten(0, 1).float().contiguous()
    base = bases_of(keys, query.shape[2], offset)
    launch_forward(*rows, base, keys, states, (out, lse), group, offset, power, cut).run()
    return out, lse


def keys_side(key: Tensor, value: Tensor, log_scale: Tensor) -> Side:
    """Lay keys out for the kernels, with a value of one, whose weighted sum is the denominator."""
    values, log_scale = value.flatten(0, 1).contiguous().to(key.dtype), log_scale.flatten(0, 1).float().contiguous()
    return Side(key.flatten(0, 1).contiguous(), values, torch.ones_like(log_scale), log_scale, 0)


def bases_of(keys: Side, queries: int, offset: int | None) -> Tensor:
    """Return what each row's sums are relative to: the largest log scale among its keys, ``[lists, queries]``."""
    top = keys.log_scale.cummax(1)[0]
    top = torch.cat([top.new_full((len(top), 1), -torch.inf), top], 1)
    top = top.masked_fill(top == -torch.inf, 0.0)
    if offset is None:
        return top[:, -1:].expand(-1, queries).contiguous()
    limit = torch.arange(1, queries + 1, dtype=torch.int64, device=top.device) + offset
    return top[:, limit.clamp(0, top.shape[1] - 1)]


def tiles_of(tokens: int, shift: int, tile: int) -> tuple[int, int]:
    """Return the first tile of positions that holds a token, and how many do."""
    first = shift // tile
    return first, (shift + tokens - 1) // tile - first + 1


def launch_forward(
    query: Tensor,
    query_log: Tensor,
    base: Tensor,
    keys: Side,
    states: States,
    results: tuple[Tensor, Tensor],
    group: int,
    offset: int | None,
    power: int,
    cut: Cut,
) -> Launch:
    """Prepare the launch that reads states and weighs pairs."""
    shift, features, width = offset or 0, query.shape[2], keys.values.shape[2]
    first, tiles = tiles_of(query.shape[1], shift, cut.tile)
    arguments = {
        "query_ptr": query, "query_log_ptr": query_log, "base_ptr": base,
        "key_ptr": keys.features, "value_ptr": keys.values, "log_ptr": keys.log_scale,
        "state_ptr": states.state, "mass_ptr": states.mass, "top_ptr": states.top,
        "out_ptr": results[0], "lse_ptr": results[1],
        "queries": query.shape[1], "keys": keys.features.shape[1], "shift": shift, "first_tile": first, "tiles": tiles,
        "chunks": states.chunks, "group": group,
        "FEATURES": features, "WIDTH": width, "WIDE": padded(features), "VALUE_WIDE": padded(width),
        "CHUNK": cut.chunk, "TILE": cut.tile, "BLOCK": cut.block, "PIECE": cut.piece, "POWER": power,
        "CAUSAL": offset is not None, "TINY": torch.finfo(torch.float32).tiny, "PRECISION": precision_of(query),
        "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip
    return Launch(_forward_kernel, (len(query) * tiles,), arguments)
