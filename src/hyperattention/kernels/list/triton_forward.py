"""The list kernel in Triton, forward: one launch for a selection, and one to merge the parts of lists that are split.

Long lists are split if there are few tiles.

A program processes some rows of a tile and the tile's list block by block: compute key indices, load keys, score them, add
log-weights, and update a running softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867). `reference` is the specification;
operands of products stay in the dtype of the input, sums are float32.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.decode.triton_parts import launch_merge
from hyperattention.kernels.launch import (
    Launch,
    StoredRows,
    by_head,
    groups_of,
    labels_in_a_row,
    precision_of,
    row_tests_of,
    store_of,
)
from hyperattention.kernels.list.reference import Lists
from hyperattention.kernels.list.triton_slots import allowed, blocks_of, labels_of, places_of, slots_of, stored_at

# lists are split if there are fewer programs than this per multiprocessor
_WAVES = 2
_MOST_SPLITS = 128


@dataclass(frozen=True)
class Shape:
    """The shape of a program.

    Args:
        rows: rows of a tile per program.
        block: slots processed at once.
        warps: warps per program.
        stages: stages of software pipelining.
    """

    rows: int
    block: int
    warps: int
    stages: int


def shape_of(rows: int, width: int, itemsize: int, capability: int) -> Shape:
    """Choose the shape of a program, so that its data fits registers and shared memory (tests compile every shape).

    Args:
        rows: rows of a tile.
        width: numbers of the widest key or value, rounded up to a power of two.
        itemsize: bytes of each.
        capability: major number of the device's; from 9 on products read shared memory, and need fewer registers.

    Returns:
        the shape.
    """
    most = max(16, triton.next_power_of_2(min(rows, 128)))
    if itemsize == 4:
        return Shape(min(most, 64), 32, 4, 2) if width <= 64 else Shape(min(most, 32), 32, 4, 1)
    if width > 128:
        return Shape(min(most, 64), 32, 8, 2)
    if capability < 9:
        return Shape(most, 32, 8, 3) if width <= 64 else Shape(min(most, 64), 32, 8, 2)
    return Shape(most, 64, 4 if most <= 64 else 8, 3 if width <= 64 else 2)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    firsts, weights, lows, highs, holes, slots,
    key_row_ptr, limit_ptr, row_label_ptr, key_label_ptr, gap_low_ptr, gap_high_ptr, table_ptr,
    scale, num_tiles, tiles, rows, size, keys, head_dim, value_dim, pages, heads, splits,
    kp, kh, ks, vp, vh, vs,
    RUNS: tl.constexpr, BLOCKS: tl.constexpr, HOLED: tl.constexpr, CAUSAL: tl.constexpr, LABELLED: tl.constexpr,
    GAP: tl.constexpr, LABELS: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    slabs = tl.cdiv(rows, ROWS)
    tile = (tl.program_id(0) // slabs).to(tl.int64)
    split = tl.program_id(1)
    row = (tl.program_id(0) % slabs) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    at = tile * rows + row
    list_number = tile // tiles
    key_row = tl.load(key_row_ptr + list_number)
    columns, value_columns = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    in_key, in_value = columns[None, :] < head_dim, value_columns[None, :] < value_dim
    stored = stored_at(tile, row, tiles, rows, size)
    q = tl.load(q_ptr + stored[:, None] * head_dim + columns[None, :], mask=inside[:, None] & in_key, other=0.0)
    limit = tl.load(limit_ptr + at, mask=inside, other=0)
    row_label, gap_low, gap_high = limit, limit, limit
    if LABELS:
        row_label = tl.load(row_label_ptr + at, mask=inside, other=0)
    if GAP:
        gap_low = tl.load(gap_low_ptr + at, mask=inside, other=0)
        gap_high = tl.load(gap_high_ptr + at, mask=inside, other=0)
    k_base, v_base = k_ptr + columns[None, :], v_ptr + value_columns[None, :]
    labels = key_label_ptr + list_number * keys

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    blocks = 0
    if SPLIT:
        for g in tl.static_range(len(RUNS)):
            blocks += tl.cdiv(slots[g], BLOCKS[g])
    share = tl.cdiv(blocks, splits)
    passed = 0
    for g in tl.static_range(len(RUNS)):
        count = tl.cdiv(slots[g], BLOCKS[g])
        begin, end = 0, count
        if SPLIT:
            begin = tl.maximum(split * share - passed, 0)
            end = tl.minimum((split + 1) * share - passed, count)
            passed += count
        begin, end = blocks_of(firsts[g], lows[g], highs[g], tile, slots[g], begin, end, RUNS[g], BLOCKS[g])
        for b in tl.range(begin, end):
            index, bias = slots_of(
                firsts[g], weights[g], lows[g], highs[g], holes[g], tile, num_tiles, b * BLOCKS[g], slots[g],
                RUNS[g], HOLED[g], BLOCKS[g],
            )  # fmt: skip
            live = bias > -float("inf")
            place = places_of(index, key_row, table_ptr, pages, heads, kp, kh, ks, PAGE)
            k = tl.load(k_base + place[:, None], mask=live[:, None] & in_key, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
            label = labels_of(labels, index, live, LABELLED[g] and LABELS)
            score = allowed(
                score, index[None, :], limit[:, None], row_label[:, None], label[None, :],
                gap_low[:, None], gap_high[:, None], CAUSAL[g], LABELLED[g] and LABELS, GAP,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(score, 1))
            # rows that saw no key take any finite number here: -inf minus -inf would be NaN
            centre = tl.where(new_top == -float("inf"), 0.0, new_top)
            weight = tl.exp(score - centre[:, None])
            shrink = tl.exp(top - centre)
            place = places_of(index, key_row, table_ptr, pages, heads, vp, vh, vs, PAGE)
            v = tl.load(v_base + place[:, None], mask=live[:, None] & in_value, other=0.0)
            rough = weight.to(v.dtype)
            mean = tl.dot(rough, v, mean * shrink[:, None], input_precision=PRECISION)
            if PRECISE:
                # the rounding error of weights in a narrow dtype
                mean = tl.dot((weight - rough.to(tl.float32)).to(v.dtype), v, mean, input_precision=PRECISION)
            total = total * shrink + tl.sum(weight, 1)
            top = new_top

    # a NaN total stays NaN
    empty = total == 0
    mean = mean / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -float("inf"), top + tl.log(tl.where(empty, 1.0, total)))
    stored += split.to(tl.int64) * num_tiles * rows
    tl.store(lse_ptr + stored, lse, mask=inside)
    out_at = out_ptr + stored[:, None] * value_dim + value_columns[None, :]
    tl.store(out_at, mean.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_value)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    scale: float,
    table: Tensor | None = None,
    *,
    splits: int | None = None,
    cut: Shape | None = None,
    precise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute attention of every tile over the keys on its list: `reference.forward` on a GPU.

    Args:
        q: queries by tile, ``[lists, tiles, group, size, head_dim]``.
        k: keys, ``[key_rows, keys, head_dim]``, or pages of them, ``[pages, kv_heads, page_size, head_dim]``.
        v: values, in the layout of the keys.
        lists: the selection.
        scale: factor of the scores.
        table: pages of each sequence, ``[sequences, pages]``, if keys lie in pages.
        splits: number of programs that share a list; None uses the size of the device.
        cut: shape of a program; None uses `shape_of`.
        precise: whether rows are computed and returned in full float32 precision for every input dtype.

    Returns:
        out ``[lists, tiles, group, size, value_dim]`` in the dtype of `q`, or float32, and lse, without its last axis, in
        float32; both are ordered by head.
    """
    (num_lists, tiles, group, size), value_dim = q.shape[:4], v.shape[-1]
    cut = cut or shape_of(group * size, widest(q, v), q.element_size(), capability_of(q))
    splits = splits_of(q, lists, cut) if splits is None else splits
    shape = (splits, num_lists, group, tiles, size)
    lse = q.new_empty(shape, dtype=torch.float32)
    out = q.new_empty((*shape, value_dim), dtype=torch.float32 if splits > 1 or precise else q.dtype)
    if out[..., 0].numel() == 0 or not k.numel() or (table is not None and not table.numel()):
        out.zero_()
        lse.fill_(-torch.inf)
    else:
        launch_forward(q, store_of(k, table), store_of(v, table), (out, lse), lists, scale, cut, precise=precise).run()
    if splits == 1:
        return out[0].transpose(1, 2), lse[0].transpose(1, 2)
    merged, merged_lse = out.new_empty(out.shape[1:]), lse.new_empty(shape[1:])
    if merged.numel():
        launch_merge((out, lse), (merged, merged_lse)).run()
    out, lse = merged.transpose(1, 2), merged_lse.transpose(1, 2)
    return out if precise else out.to(q.dtype), lse


def launch_forward(
    q: Tensor,
    k: StoredRows,
    v: StoredRows,
    results: tuple[Tensor, Tensor],
    lists: Lists,
    scale: float,
    cut: Shape,
    *,
    precise: bool = False,
) -> Launch:
    """Prepare the launch, to run it or to compile it for another machine.

    Args:
        q: queries by tile.
        k: keys.
        v: values.
        results: out ``[splits, lists, group, tiles, size, value_dim]`` and lse without its last axis, to be written.
        lists: the selection.
        scale: factor of the scores.
        cut: shape of a program.
        precise: whether the rounding error of weights in a narrow dtype is added again.

    Returns:
        the launch.
    """
    num_lists, tiles, group, size, head_dim = q.shape
    rows, value_dim = group * size, v.data.shape[-1]
    width, value_width = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    splits, num_tiles = len(results[0]), num_lists * tiles
    return Launch(
        _forward_kernel,
        (num_tiles * triton.cdiv(rows, cut.rows), splits),
        {
            "q_ptr": by_head(q), "k_ptr": k.data, "v_ptr": v.data, "out_ptr": results[0], "lse_ptr": results[1],
            **groups_of(lists, cut.block), **row_tests_of(lists), "table_ptr": k.table,
            "scale": scale, "num_tiles": num_tiles, "tiles": tiles, "rows": rows, "size": size,
            "keys": labels_in_a_row(lists),
            "head_dim": head_dim, "value_dim": value_dim, "pages": k.pages, "heads": k.heads,
            "kp": k.strides[0], "kh": k.strides[1], "ks": k.strides[2],
            "vp": v.strides[0], "vh": v.strides[1], "vs": v.strides[2],
            "PAGE": k.page, "splits": splits, "SPLIT": splits > 1, "PRECISION": precision_of(q, precise),
            "PRECISE": precise and q.dtype != torch.float32,
            "ROWS": cut.rows, "WIDTH": width, "VALUE_WIDTH": value_width,
            "num_warps": cut.warps, "num_stages": cut.stages,
        },
    )  # fmt: skip


def widest(*tensors: Tensor) -> int:
    """Return the width of the widest last axis, rounded up to a power of two."""
    return max(16, *(triton.next_power_of_2(x.shape[-1]) for x in tensors))


def capability_of(x: Tensor) -> int:
    """Return the major compute capability of a device, which determines the shapes of programs."""
    return torch.cuda.get_device_capability(x.device)[0] if x.device.type == "cuda" else 9


def splits_of(q: Tensor, lists: Lists, cut: Shape) -> int:
    """Return the number of splits of lists, above one if there are too few tiles to fill the device."""
    if q.device.type != "cuda":
        return 1
    programs = max(1, q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2] * q.shape[3], cut.rows))
    wanted = _WAVES * torch.cuda.get_device_properties(q.device).multi_processor_count
    return max(1, min(triton.cdiv(wanted, programs), lists.num_slots // (4 * cut.block), _MOST_SPLITS))
