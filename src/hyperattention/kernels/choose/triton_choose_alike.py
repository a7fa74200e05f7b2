"""Choose keys for lists of alike queries in Triton: one launch groups queries, scores keys and draws, in bounded memory.

As many programs as a GPU holds at once take some lists after others, and each has memory for those that it is at: averages
of queries, what their scores are compared with, and shares of keys. Nothing of all lists is written but the draws.

Where a tile sees many keys a program takes lists of one tile alone. Few averages of all of these find candidates among all
keys, which are scored then: `DrawAlike` does so in PyTorch. A tile that has more lists than a program is cut, as it is where
the heads of a group are sorted in parts, and each part has coarse averages and candidates of its own.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.alike_plan import AlikePlan
from hyperattention.kernels.choose.triton_alike_bars import bar_averages
from hyperattention.kernels.choose.triton_alike_shares import share_keys
from hyperattention.kernels.choose.triton_candidates import find_candidates
from hyperattention.kernels.choose.triton_coarse_alike import group_averages
from hyperattention.kernels.choose.triton_draw_alike import UNITS, draw_lists
from hyperattention.kernels.choose.triton_group_alike import group_list
from hyperattention.kernels.choose.triton_sort_alike import DIRECTIONS
from hyperattention.kernels.launch import Launch

# keys read at once; averages whose bars are sought at once, and stretches of keys read for them
_KEYS, _ROWS, _STRETCHES = 64, 64, 32
# blocks of all lists of a program that are read at once, and whose draws are placed at once; slots written at once
_BLOCKS, _PLACED, _SLOTS = 2048, 2048, 512
# averages, at least as many as a product has
_LEAST = 16
# numbers of the queries of a list that are held at once
_NUMBERS = 8192
# numbers of all averages of a tile that are held at once; bits of a threshold found in a pass over shares of keys, and
# shares that are compared, or placed, at once
_OF_AVERAGES, _DIGIT, _COUNTED, _TAKEN = 2048, 3, 1024, 1024
# bytes of a list's rows that four warps hold
_BYTES = 16_384


@triton.jit
def _level(tile, first_tile, length, step, tile_size, keys, most, first, levels):
    """Tell how many times blocks of `first` keys are doubled for a tile, by the number of keys that it may see."""
    number = first_tile + tile // length * step + tile % length
    seen = tl.minimum(keys, (number + 1) * tile_size)
    level, edge = 0, most * first
    for _ in tl.range(1, levels):
        level += (seen > edge).to(tl.int32)
        edge *= 2
    return level


@triton.jit
def _among_candidates(
    query_ptr, spread_ptr, log_rows_ptr, bar_ptr, directions_ptr, moments_ptr, keys_ptr, log_value_ptr, edges_ptr,
    share_ptr, numbers_ptr, begin, until, room, size, candidates, groups, bound,
    EDGES: tl.constexpr, MANY: tl.constexpr, OF_LIST: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, STEPS: tl.constexpr, NORMAL: tl.constexpr, STRETCHES: tl.constexpr, DEVIATIONS: tl.constexpr,
    LISTS: tl.constexpr, GROUPS: tl.constexpr, COARSE: tl.constexpr, SLICE: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, BITS: tl.constexpr, DIGIT: tl.constexpr, COUNTED: tl.constexpr, TAKEN: tl.constexpr,
    ROUGH: tl.constexpr,
):  # fmt: skip
    """Find the candidates of some lists of one tile, and score these alone: their shares, and how many there are."""
    # coarse averages stand behind those of the lists
    coarse_ptr, coarse_spread_ptr = query_ptr + LISTS * OF_LIST * DIM, spread_ptr + LISTS * 2 * DIM
    coarse_rows_ptr, coarse_bar_ptr = log_rows_ptr + LISTS * OF_LIST, bar_ptr + LISTS * OF_LIST
    group_averages(
        query_ptr, spread_ptr, log_rows_ptr, directions_ptr, coarse_ptr, coarse_spread_ptr, coarse_rows_ptr, until - begin,
        groups, bound,
        OF_LIST, LISTS * GROUPS, COARSE, DIM, WIDTH, SLICE, COLUMNS, LISTS, STEPS, ROUGH,
    )  # fmt: skip
    tl.debug_barrier()
    edge_at = edges_ptr + begin // MANY * EDGES
    bar_averages(
        coarse_ptr, coarse_rows_ptr, moments_ptr, edge_at, coarse_bar_ptr, 0, 0, 1, size, bound,
        EDGES, 1, COARSE, NORMAL, DIM, COARSE, WIDTH, STRETCHES, "ieee",
    )  # fmt: skip
    tl.debug_barrier()
    count = share_keys(
        coarse_ptr, coarse_bar_ptr, coarse_spread_ptr, keys_ptr, keys_ptr, log_value_ptr, edge_at, share_ptr, numbers_ptr,
        0, LISTS, room, size, 0,
        EDGES, LISTS, COARSE // LISTS, DIM, DEVIATIONS, False, LISTS, COARSE // LISTS, WIDTH, KEYS, STAGES, "ieee",
        True, False,
    )  # fmt: skip
    tl.debug_barrier()
    count = find_candidates(share_ptr, numbers_ptr, count, candidates, BITS, DIGIT, COUNTED, TAKEN)
    tl.debug_barrier()
    return share_keys(
        query_ptr, bar_ptr, spread_ptr, keys_ptr, keys_ptr, log_value_ptr, edges_ptr, share_ptr, numbers_ptr,
        begin, until, room, size, count,
        EDGES, MANY, OF_LIST, DIM, DEVIATIONS, False, LISTS, GROUPS, WIDTH, KEYS, STAGES, "ieee",
        False, True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "first_tile",
        "length",
        "step",
        "most",
        "first",
        "levels",
        "span",
        "together",
        "lists",
        "units",
        "stretches",
        "plain",
        "own",
        "coarse",
        "averages",
    ]
)
def _kernel(
    q_ptr, source_ptr, directions_ptr, edges_ptr, noise_ptr, keys_ptr, variance_ptr, moments_ptr, log_value_ptr,
    index_ptr, weight_ptr, low_ptr, high_ptr, query_ptr, spread_ptr, log_rows_ptr, bar_ptr, share_ptr, numbers_ptr,
    scale, queries, kv_heads, sorts, tiles, s_batch, s_head, s_query,
    first_tile, length, step, tile_size, keys, most, first, levels, blocks, stretches, span, together, lists, units, room,
    num, even, least, bound, plain, own, candidates, coarse, averages,
    GROUP: tl.constexpr, MANY: tl.constexpr, SORTED: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
    OF_LIST: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    COLUMNS: tl.constexpr, STEPS: tl.constexpr, EDGES: tl.constexpr, NORMAL: tl.constexpr, AVERAGES: tl.constexpr,
    STRETCHES: tl.constexpr, PLAIN: tl.constexpr, DEVIATIONS: tl.constexpr, LISTS: tl.constexpr, GROUPS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, ROUNDS: tl.constexpr, ALL: tl.constexpr, SHIFT: tl.constexpr,
    BLOCKS: tl.constexpr, PLACED: tl.constexpr, SLOTS: tl.constexpr, SEVERAL: tl.constexpr, ROUGH: tl.constexpr,
    HELD: tl.constexpr, AMONG: tl.constexpr, COARSE: tl.constexpr, OF_AVERAGES: tl.constexpr, BITS: tl.constexpr,
    DIGIT: tl.constexpr, COUNTED: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    query_ptr += program * HELD * OF_LIST * DIM
    spread_ptr += program * HELD * 2 * DIM
    log_rows_ptr += program * HELD * OF_LIST
    bar_ptr += program * HELD * OF_LIST
    share_ptr += program * LISTS * room
    numbers_ptr += program * candidates
    each = units // lists
    # addresses that all of them share would take the registers of what computes
    for turn in tl.range(0, tl.cdiv(units, tl.num_programs(0)), disable_licm=True):
        # the last lists, which see most, come first; who had the longest of a turn has the shortest of the next
        place = tl.where(turn % 2 == 0, tl.program_id(0), tl.num_programs(0) - 1 - tl.program_id(0))
        unit = turn * tl.num_programs(0) + place
        # some rows of keys at a time, so that programs read the same keys at about the same time
        within = unit % (each * together)
        one = (unit // (each * together) * together + within % together).to(tl.int64)
        number = each - 1 - within // together
        begin = number * span
        end = tl.minimum(begin + span, tiles * MANY)
        if AMONG:
            # lists of one tile at a time from `plain` on, where there are candidates
            behind = number - tl.cdiv(plain, span)
            begin = tl.where(behind < 0, begin, plain + behind * own)
            end = tl.where(behind < 0, tl.minimum(end, plain), begin + own)
        # nothing is left for some at last
        until = tl.where(unit < units, end, begin)
        level = _level((until - 1) // MANY, first_tile, length, step, tile_size, keys, most, first, levels)
        size = first << level
        of = level * lists + one
        among = 0
        if AMONG:
            among = ((begin >= plain) & (begin < until)).to(tl.int32)
            # keys are averaged nowhere
            doubled, level, of = size, among, one
            size = tl.full([], 1, tl.int32)
        edges_at, row = edges_ptr + one * tiles * EDGES, one * tiles * MANY
        q_at = q_ptr + (one // kv_heads) * s_batch + (one % kv_heads) * GROUP * s_head
        for at in tl.range(begin, until, disable_licm=True):
            group_list(
                q_at, source_ptr + (row + at) * EACH, directions_ptr + (one * sorts + at // SORTED) * COLUMNS * DIM,
                query_ptr + (at - begin) * OF_LIST * DIM, spread_ptr + (at - begin) * 2 * DIM,
                log_rows_ptr + (at - begin) * OF_LIST, scale, queries, s_head, s_query,
                EACH, ROWS, OF_LIST, PADDED, DIM, WIDTH, SLICE, COLUMNS, STEPS, ROUGH,
            )  # fmt: skip
        # what is written is read by other threads, here and below
        tl.debug_barrier()
        for average in tl.range(0, LISTS * OF_LIST, AVERAGES):
            bar_averages(
                query_ptr, log_rows_ptr, moments_ptr + of * stretches * 2 * DIM, edges_at, bar_ptr, average, begin, until,
                size, bound, EDGES, MANY, OF_LIST, NORMAL, DIM, AVERAGES, WIDTH, STRETCHES, "ieee",
            )  # fmt: skip
        tl.debug_barrier()
        keys_at, log_value_at = keys_ptr + of * blocks * DIM, log_value_ptr + of * blocks
        variance_at = variance_ptr + (of - PLAIN * lists) * blocks * DIM
        count = 0
        if AMONG and among > 0:
            groups = tl.maximum(tl.minimum(tl.minimum(coarse * own, averages * own // doubled), OF_LIST * own), 1)
            count = _among_candidates(
                query_ptr, spread_ptr, log_rows_ptr, bar_ptr,
                directions_ptr + (one * sorts + begin // SORTED) * COLUMNS * DIM, moments_ptr + of * stretches * 2 * DIM,
                keys_at, log_value_at, edges_at, share_ptr, numbers_ptr,
                begin, until, room, size, candidates, groups, bound,
                EDGES, MANY, OF_LIST, DIM, WIDTH, COLUMNS, STEPS, NORMAL, STRETCHES, DEVIATIONS, LISTS, GROUPS, COARSE,
                OF_AVERAGES, KEYS, STAGES, BITS, DIGIT, COUNTED, TAKEN, ROUGH,
            )  # fmt: skip
        if level < PLAIN:
            count = share_keys(
                query_ptr, bar_ptr, spread_ptr, keys_at, keys_at, log_value_at, edges_at, share_ptr, numbers_ptr,
                begin, until, room, size, 0,
                EDGES, MANY, OF_LIST, DIM, DEVIATIONS, False, LISTS, GROUPS, WIDTH, KEYS, STAGES, "ieee", False, False,
            )  # fmt: skip
        if SEVERAL and level >= PLAIN:
            count = share_keys(
                query_ptr, bar_ptr, spread_ptr, keys_at, variance_at, log_value_at, edges_at, share_ptr, numbers_ptr,
                begin, until, room, size, 0,
                EDGES, MANY, OF_LIST, DIM, DEVIATIONS, True, LISTS, GROUPS, WIDTH, KEYS, 2, "ieee", False, False,
            )  # fmt: skip
        tl.debug_barrier()
        draw_lists(
            share_ptr, numbers_ptr, edges_at, noise_ptr + row, index_ptr + row * num, weight_ptr + row * num, low_ptr + row,
            high_ptr + row, begin, until, count, room, num, size, among, even, least,
            EDGES, MANY, LISTS, ROUNDS, ALL, SHIFT, BLOCKS, PLACED, SLOTS, AMONG,
        )  # fmt: skip
        tl.debug_barrier()


def launch_choice(
    given: tuple[Tensor, ...], blocks: tuple[Tensor, ...], results: tuple[Tensor, ...], memory: tuple[Tensor, ...],
    plan: AlikePlan, scale: float, deviations: float, bound: float, even: float, least: float,
) -> Launch:  # fmt: skip
    """Prepare the launch of `operator_alike.choose_alike`, which writes into `results`."""
    q, source, directions, edges, noise = given
    keys, variance, moments, log_value = blocks
    index, weight, low, high = results
    query, spread, log_rows, bar, share, numbers = memory
    q, (rows, tiles) = q if q.stride(3) == 1 else q.contiguous(), edges.shape[:2]
    each, width, lists, num = source.shape[2], q.shape[3], share.shape[1], index.shape[2]
    padded, broad, long = (triton.next_power_of_2(x) for x in (plan.groups, max(16, width), max(16, each)))
    span, several = plan.span(lists), len(variance) > 0
    # half as many keys at once for each: several tensors of wide keys, and many wide averages
    fewer = (1 + (several and broad > 128)) * (1 + (padded * broad > 2048))
    wide = plan.coarse_averages(width)
    return Launch(
        _kernel,
        (len(query),),
        {
            "q_ptr": q, "source_ptr": source, "directions_ptr": directions, "edges_ptr": edges, "noise_ptr": noise,
            "keys_ptr": keys, "variance_ptr": variance, "moments_ptr": moments, "log_value_ptr": log_value,
            "index_ptr": index, "weight_ptr": weight, "low_ptr": low, "high_ptr": high, "query_ptr": query,
            "spread_ptr": spread, "log_rows_ptr": log_rows, "bar_ptr": bar, "share_ptr": share, "numbers_ptr": numbers,
            "scale": scale, "queries": q.shape[2], "kv_heads": rows // q.shape[0], "sorts": directions.shape[1],
            "tiles": tiles,
            "s_batch": q.stride(0), "s_head": q.stride(1), "s_query": q.stride(2), "first_tile": plan.first_tile,
            "length": plan.length, "step": plan.step, "tile_size": plan.size, "keys": plan.keys, "most": plan.most,
            "first": plan.first, "levels": plan.levels, "blocks": keys.shape[2], "stretches": moments.shape[2],
            "span": span, "together": plan.together(rows), "lists": rows, "units": plan.units(rows, tiles, width),
            "room": share.shape[2], "num": num,
            "plain": plan.plain(tiles) * plan.many, "own": plan.own(width), "candidates": numbers.shape[1],
            "coarse": plan.coarse, "averages": plan.averages,
            "even": even, "least": least, "bound": bound, "GROUP": q.shape[1] * q.shape[0] // rows, "MANY": plan.many,
            "SORTED": source.shape[1] // directions.shape[1],
            "EACH": each, "ROWS": long, "OF_LIST": plan.groups, "PADDED": max(_LEAST, padded), "DIM": width,
            "WIDTH": broad, "SLICE": min(broad, max(16, _NUMBERS // long)), "COLUMNS": DIRECTIONS, "STEPS": plan.steps,
            "EDGES": edges.shape[2], "NORMAL": plan.normal,
            "AVERAGES": _ROWS if broad <= 128 else _ROWS // 2, "STRETCHES": _STRETCHES,
            "PLAIN": len(keys) - len(variance), "DEVIATIONS": deviations, "LISTS": lists, "GROUPS": padded,
            "KEYS": _KEYS // fewer, "STAGES": 3 if broad <= 128 else 2,
            "ROUNDS": plan.rounds, "ALL": UNITS, "SHIFT": 62 - num.bit_length(), "BLOCKS": _BLOCKS // lists,
            "PLACED": _PLACED // lists, "SLOTS": _SLOTS // lists, "SEVERAL": several,
            # queries are estimates once they are compared; averages are in bfloat16, and only tests have wider ones
            "ROUGH": "ieee" if torch.version.hip else "tf32",
            "HELD": query.shape[1], "AMONG": plan.candidates.bit_length(), "COARSE": wide,
            "OF_AVERAGES": min(broad, max(16, _OF_AVERAGES // (lists * padded))), "BITS": 8 * share.element_size(),
            "DIGIT": _DIGIT, "COUNTED": _COUNTED, "TAKEN": _TAKEN,
            "num_warps": 4 if long * broad * q.element_size() <= _BYTES else 8, "num_stages": 1,
        },
    )  # fmt: skip
