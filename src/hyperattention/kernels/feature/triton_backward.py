"""The feature kernel in Triton, backward: one kernel reads states for the queries, and then, from the end, for the keys.

The gradient of a query's features is a sum over keys, those of a key's features and of its value are sums over queries, of
the same form (see `reference.backward`): each side has features, values with a last number, and a log scale. For the queries
these are the slopes of the output and log(row's share); so queries can be summed like keys, and keys read those sums.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.feature.triton_forward import keys_side, tiles_of
from hyperattention.kernels.feature.triton_states import Cut, Side, States, padded, states_of
from hyperattention.kernels.launch import Launch, precision_of

# numbers of expanded features that a program multiplies at once
_EXPANDED = 64


def cut_of(features: int, width: int, itemsize: int, power: int) -> Cut:
    """Choose sizes of programs, which hold two products of pairs and two sums (tests compile them).

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
    # the fewer chunks, the fewer states to write, to scan one after the other and to read
    chunk = 256 if power == 1 else 512
    if itemsize == 4:
        return Cut(chunk, 32, 16, piece, 4, 1)
    return Cut(chunk, 64, 32, piece, 4, 2) if wide <= 64 else Cut(chunk, 32, 32, piece, 8, 2)


@triton.jit
def _slopes_kernel(
    row_ptr, slope_ptr, row_last_ptr, row_log_ptr, key_ptr, value_ptr, last_ptr, log_ptr,
    state_ptr, mass_ptr, top_ptr, grad_ptr, sum_ptr, scale_ptr,
    rows, keys, row_shift, key_shift, first_tile, tiles, chunks, row_group, key_group,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, POWER: tl.constexpr,
    CAUSAL: tl.constexpr, REVERSE: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // tiles).to(tl.int64)
    start = (first_tile + tl.program_id(0) % tiles) * TILE
    owner = head // row_group
    feature, column = tl.arange(0, WIDE), tl.arange(0, VALUE_WIDE)
    position = start + tl.arange(0, TILE)
    index = position - row_shift
    live = (index >= 0) & (index < rows)
    row = head * rows + index
    in_features, in_values = live[:, None] & (feature[None, :] < FEATURES), live[:, None] & (column[None, :] < WIDTH)
    query = tl.load(row_ptr + row[:, None] * FEATURES + feature[None, :], mask=in_features, other=0.0)  # [TILE, WIDE]
    slope = tl.load(slope_ptr + row[:, None] * WIDTH + column[None, :], mask=in_values, other=0.0)  # [TILE, VALUE_WIDE]
    row_last = tl.load(row_last_ptr + row, mask=live, other=0.0)
    row_log = tl.load(row_log_ptr + row, mask=live, other=-float("inf"))
    chunk = tl.maximum(start, 0) // CHUNK
    # sums over chunks before the row's own, or behind it; all of them if nothing is hidden
    entry = 0 if REVERSE else chunks
    if CAUSAL:
        entry = tl.minimum(chunk + (1 if REVERSE else 0), chunks)
    at = (owner * (chunks + 1) + entry) * (tl.cdiv(FEATURES, PIECE) * PIECE * WIDE if POWER == 2 else WIDE)
    grad = tl.zeros([TILE, WIDE], tl.float32)
    total = tl.zeros([TILE, VALUE_WIDE], tl.float32)
    if POWER == 2:
        for piece in range(0, tl.cdiv(FEATURES, PIECE)):
            number, pair = piece * PIECE + tl.arange(0, PIECE), piece * PIECE * WIDE + tl.arange(0, PIECE * WIDE)
            others = tl.load(
                row_ptr + row[:, None] * FEATURES + number[None, :],
                mask=live[:, None] & (number[None, :] < FEATURES),
                other=0.0,
            ).to(tl.float32)  # [TILE, PIECE]
            state = tl.load(state_ptr + (at + pair)[:, None] * VALUE_WIDE + column[None, :])
            by_pair = tl.dot(slope, tl.trans(state), input_precision=PRECISION)
            by_pair += row_last[:, None] * tl.load(mass_ptr + at + pair)[None, :]
            by_pair = tl.reshape(by_pair, [TILE, PIECE, WIDE])
            # pairs in either order: a state is symmetric
            grad += 2 * tl.sum(by_pair * others[:, :, None], 1)
            if SUMS:
                pairs = tl.reshape(others[:, :, None] * query.to(tl.float32)[:, None, :], [TILE, PIECE * WIDE])
                total = tl.dot(pairs.to(query.dtype), state, total, input_precision=PRECISION)
    else:
        state = tl.load(state_ptr + (at + feature)[:, None] * VALUE_WIDE + column[None, :])
        grad = tl.dot(slope, tl.trans(state), grad, input_precision=PRECISION)
        grad += row_last[:, None] * tl.load(mass_ptr + at + feature)[None, :]
        if SUMS:
            total = tl.dot(query, state, total, input_precision=PRECISION)
    # rows that see nothing have sums of 0 and may have any scale
    scale = tl.where(row_log == -float("inf"), 0.0, tl.exp(tl.load(top_ptr + owner * (chunks + 1) + entry) + row_log))
    grad = tl.where(grad == 0.0, 0.0, grad * scale[:, None])
    total = tl.where(total == 0.0, 0.0, total * scale[:, None])
    if CAUSAL:
        # blocks of the chunk whose tokens some row sees; none at negative positions
        low = start if REVERSE else chunk * CHUNK
        high = (chunk + 1) * CHUNK if REVERSE else start + TILE
        steps = tl.where(start < 0, 0, tl.cdiv(high - low, BLOCK))
        for block in range(0, steps * key_group):
            key_position = low + (block % steps) * BLOCK + tl.arange(0, BLOCK)
            key_index = key_position - key_shift
            near = (key_index >= 0) & (key_index < keys)
            place = (owner * key_group + block // steps) * keys + key_index
            key = tl.load(
                key_ptr + place[:, None] * FEATURES + feature[None, :],
                mask=near[:, None] & (feature[None, :] < FEATURES),
                other=0.0,
            )  # [BLOCK, WIDE]
            value = tl.load(
                value_ptr + place[:, None] * WIDTH + column[None, :],
                mask=near[:, None] & (column[None, :] < WIDTH),
                other=0.0,
            )  # [BLOCK, VALUE_WIDE]
            last = tl.load(last_ptr + place, mask=near, other=0.0)
            log_scale = tl.load(log_ptr + place, mask=near, other=-float("inf"))
            visible = key_position[None, :] >= position[:, None] if REVERSE else key_position[None, :] <= position[:, None]
            log_weight = tl.where(visible & near[None, :], log_scale[None, :] + row_log[:, None], -float("inf"))
            weight = tl.exp(log_weight)
            product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            by = tl.dot(slope, tl.trans(value), input_precision=PRECISION) + row_last[:, None] * last[None, :]
            if POWER == 2:
                by = by * product * 2
                product = product * product
            by = tl.where(weight == 0.0, 0.0, by * weight)
            grad = tl.dot(by.to(key.dtype), key, grad, input_precision=PRECISION)
            if SUMS:
                product = tl.where(weight == 0.0, 0.0, product * weight)
                total = tl.dot(product.to(value.dtype), value, total, input_precision=PRECISION)
    tl.store(grad_ptr + row[:, None] * FEATURES + feature[None, :], grad.to(grad_ptr.dtype.element_ty), mask=in_features)
    if SUMS:
        by_scale = tl.sum(grad * query.to(tl.float32), 1) / POWER
        tl.store(scale_ptr + row, by_scale, mask=live)
        tl.store(sum_ptr + row[:, None] * WIDTH + column[None, :], total.to(sum_ptr.dtype.element_ty), mask=in_values)


def backward(
    grads: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    offset: int | None,
    power: int,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradient of `forward`: `reference.backward` on a GPU.

    Args:
        grads: gradients of out and of lse.
        saved: query, key, value and the log scales of queries and keys, then out and lse of the forward pass.
        offset: as in `forward`.
        power: 1 or 2.
        cut: sizes of programs; None uses `cut_of`.

    Returns:
        gradients of query, key, value and the two log scales, in their dtypes; 0 from rows without a denominator.
    """
    query, key, value, query_log_scale, key_log_scale, out, lse = saved
    if not (query.numel() and key.numel() and value.numel()):
        return tuple(torch.zeros_like(x) for x in saved[:5])  # pyright: ignore[reportReturnType]
    cut = cut or cut_of(query.shape[3], value.shape[3], query.element_size(), power)
    empty = lse == -torch.inf
    grad_out, grad_lse = grads[0].masked_fill(empty[..., None], 0.0), grads[1].masked_fill(empty, 0.0)
    share = (query_log_scale.float() - lse).masked_fill(empty, -torch.inf)
    last = grad_lse - (grad_out.float() * out.float()).sum(-1)
    slopes = grad_out.to(query.dtype).flatten(0, 1).contiguous(), last.flatten(0, 1).contiguous()
    rows = Side(query.flatten(0, 1).contiguous(), *slopes, share.flatten(0, 1).contiguous(), offset or 0)
    keys, group = keys_side(key, value, key_log_scale), query.shape[1] // key.shape[1]
    found = [torch.empty_like(x) for x in (rows.features, keys.features, keys.values, keys.log_scale)]
    for launch in launches_backward(rows, keys, found, group, offset, power, cut):
        launch.run()
    grad_rows, grad_keys, grad_values, grad_scale = found
    return (
        grad_rows.view(query.shape),
        grad_keys.view(key.shape).to(key.dtype),
        grad_values.view(value.shape).to(value.dtype),
        grad_lse.to(query_log_scale.dtype),
        grad_scale.view(key_log_scale.shape).to(key_log_scale.dtype),
    )


def launches_backward(
    rows: Side, keys: Side, found: list[Tensor], group: int, offset: int | None, power: int, cut: Cut
) -> list[Launch]:
    """Sum both sides, and prepare the launches that read the sums: for the queries, then for the keys."""
    of_keys = states_of(keys, group=1, cut=cut, power=power, reverse=False)
    of_rows = states_of(rows, group=group, cut=cut, power=power, reverse=True)
    causal = offset is not None
    return [
        launch_slopes(rows, keys, of_keys, (found[0], None, None), (group, 1), causal, power, cut),
        launch_slopes(keys, rows, of_rows, (found[1], found[2], found[3]), (1, group), causal, power, cut),
    ]


def launch_slopes(
    rows: Side,
    keys: Side,
    states: States,
    found: tuple[Tensor, Tensor | None, Tensor | None],
    groups: tuple[int, int],
    causal: bool,
    power: int,
    cut: Cut,
) -> Launch:
    """Prepare the launch for one side.

    Args:
        rows: what gradients are of.
        keys: what they are sums over.
        states: of the keys; summed from the end if `found` has sums.
        found: gradients of features; if wanted, sums of the values of `keys`, and gradients of log scales, in float32.
        groups: lists of rows, and of keys, that share states.
        causal: whether only some pairs count.
        power: of products of features.
        cut: sizes of programs.

    Returns:
        the launch.
    """
    features, width, sums = rows.features.shape[2], rows.values.shape[2], found[1]
    first, tiles = tiles_of(rows.features.shape[1], rows.shift, cut.tile)
    arguments = {
        "row_ptr": rows.features, "slope_ptr": rows.values, "row_last_ptr": rows.last, "row_log_ptr": rows.log_scale,
        "key_ptr": keys.features, "value_ptr": keys.values, "last_ptr": keys.last, "log_ptr": keys.log_scale,
        "state_ptr": states.state, "mass_ptr": states.mass, "top_ptr": states.top,
        "grad_ptr": found[0], "sum_ptr": found[0] if sums is None else sums,
        "scale_ptr": rows.log_scale if found[2] is None else found[2],
        "rows": rows.features.shape[1], "keys": keys.features.shape[1], "row_shift": rows.shift, "key_shift": keys.shift,
        "first_tile": first, "tiles": tiles, "chunks": states.chunks, "row_group": groups[0], "key_group": groups[1],
        "FEATURES": features, "WIDTH": width, "WIDE": padded(features), "VALUE_WIDE": padded(width),
        "CHUNK": cut.chunk, "TILE": cut.tile, "BLOCK": cut.block, "PIECE": cut.piece, "POWER": power,
        "CAUSAL": causal, "REVERSE": sums is not None, "SUMS": sums is not None,
        "PRECISION": precision_of(rows.features), "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip
    return Launch(_slopes_kernel, (len(rows.features) * tiles,), arguments)
