"""Choose keys for lists of alike queries in Triton: one launch groups queries, scores keys and draws, in bounded memory.

As many programs as a GPU holds at once take lists of one tile after others, and each has memory for those that it is at:
averages of queries, what their scores are compared with, shares of keys, and numbers of what is scored. Nothing of all lists
is written but the draws.

Where a tile sees many keys, blocks of them are scored, and those of the largest shares are opened, down to keys:
`AlikeScan` does so in PyTorch. A tile that has more lists than a program is cut, as it is where the heads of a group are
sorted in parts, and each part opens blocks of its own.
"""
# kernels are written in Triton's language, which its type stubs do not describe
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperattention.kernels.choose.alike_plan import AlikePlan
from hyperattention.kernels.choose.triton_alike_blocks import blocks_before
from hyperattention.kernels.choose.triton_alike_open import keep_left, number_blocks, open_blocks
from hyperattention.kernels.choose.triton_alike_shares import share_keys
from hyperattention.kernels.choose.triton_alike_sums import sum_blocks
from hyperattention.kernels.choose.triton_candidates import find_largest
from hyperattention.kernels.choose.triton_draw_alike import UNITS, draw_lists
from hyperattention.kernels.choose.triton_group_alike import group_list
from hyperattention.kernels.choose.triton_sort_alike import DIRECTIONS
from hyperattention.kernels.launch import Launch

# keys read at once; averages whose sums are sought at once, and blocks read for them: a key read serves all averages
_KEYS, _ROWS, _SUMMED = 64, 128, 32
# candidates of all lists of a program that are read at once, and whose draws are placed at once; slots written at once
_PLACES, _PLACED, _SLOTS = 2048, 2048, 512
# averages, at least as many as a product has
_LEAST = 16
# numbers of the queries of a list that are held at once
_NUMBERS = 8192
# bits of a threshold found in a pass over shares; shares that are compared, or placed, at once; numbers written at once
_DIGIT, _COUNTED, _TAKEN, _WRITTEN = 3, 1024, 1024, 1024
# bytes of a list's rows that four warps hold
_BYTES = 16_384


@triton.jit
def _level(tile, first_tile, length, step, tile_size, keys, most, levels):
    """Tell how many times the first blocks of a tile are opened, by the number of keys that it may see."""
    number = first_tile + tile // length * step + tile % length
    seen = tl.minimum(keys, (number + 1) * tile_size)
    level, edge = 0, most
    for _ in tl.range(1, levels):
        level += (seen > edge).to(tl.int32)
        edge *= 4
    return level


@triton.jit
def _sums(
    query_ptr, spread_ptr, log_rows_ptr, keys_ptr, variance_ptr, numbers_ptr, bar_ptr, lists, count, size, bound,
    OF_LIST: tl.constexpr, DIM: tl.constexpr, WITHIN: tl.constexpr, LESS: tl.constexpr, LISTS: tl.constexpr,
    AVERAGES: tl.constexpr, WIDTH: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Add sums over some blocks, or take them away, for all averages of a program."""
    # what is written is read by other threads, here and below
    tl.debug_barrier()
    for average in tl.range(0, LISTS * OF_LIST, AVERAGES):
        sum_blocks(
            query_ptr, spread_ptr, log_rows_ptr, keys_ptr, variance_ptr, numbers_ptr, bar_ptr, average, lists, count, size,
            bound, OF_LIST, DIM, WITHIN, LESS, LISTS, AVERAGES, WIDTH, SUMMED, "ieee",
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=["first_tile", "length", "step", "most", "levels", "together", "lists", "turns", "own", "wider"]
)
def _kernel(
    q_ptr, source_ptr, directions_ptr, edges_ptr, noise_ptr, keys_ptr, variance_ptr, log_value_ptr,
    index_ptr, weight_ptr, low_ptr, high_ptr, query_ptr, spread_ptr, log_rows_ptr, bar_ptr, share_ptr, numbers_ptr,
    scale, queries, kv_heads, sorts, tiles, s_batch, s_head, s_query,
    first_tile, length, step, tile_size, keys, most, levels, blocks, together, lists, turns, room, units, behind,
    num, even, least, bound, own, candidates, wider,
    GROUP: tl.constexpr, MANY: tl.constexpr, SORTED: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
    OF_LIST: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    COLUMNS: tl.constexpr, STEPS: tl.constexpr, EDGES: tl.constexpr, AVERAGES: tl.constexpr, SUMMED: tl.constexpr,
    DEVIATIONS: tl.constexpr, LISTS: tl.constexpr, GROUPS: tl.constexpr,
    KEYS: tl.constexpr, WITHIN: tl.constexpr, STAGES: tl.constexpr, ROUNDS: tl.constexpr, ALL: tl.constexpr,
    SHIFT: tl.constexpr, PLACES: tl.constexpr, PLACED: tl.constexpr, SLOTS: tl.constexpr, SEVERAL: tl.constexpr,
    ROUGH: tl.constexpr,
    BITS: tl.constexpr, DIGIT: tl.constexpr, COUNTED: tl.constexpr, TAKEN: tl.constexpr, WRITTEN: tl.constexpr,
    DIGITS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    query_ptr += program * LISTS * OF_LIST * DIM
    spread_ptr += program * LISTS * 2 * DIM
    log_rows_ptr += program * LISTS * OF_LIST
    bar_ptr += program * LISTS * OF_LIST
    share_ptr += program * LISTS * room
    numbers_ptr += program * units
    # numbers of opened blocks, behind shares of all
    opened_ptr = (share_ptr + behind).to(tl.pointer_type(tl.int32), bitcast=True)
    each = turns // lists
    # addresses that all of them share would take the registers of what computes
    for turn in tl.range(0, tl.cdiv(turns, tl.num_programs(0)), disable_licm=True):
        # the last lists, which see most, come first; who had the longest of a turn has the shortest of the next
        place = tl.where(turn % 2 == 0, tl.program_id(0), tl.num_programs(0) - 1 - tl.program_id(0))
        unit = turn * tl.num_programs(0) + place
        # some rows of keys at a time, so that programs read the same keys at about the same time
        within = unit % (each * together)
        one = (unit // (each * together) * together + within % together).to(tl.int64)
        begin = (each - 1 - within // together) * own
        # nothing is left for some at last
        if unit < turns:
            tile, row = begin // MANY, one * tiles * MANY + begin
            edge_at = edges_ptr + (one * tiles + tile) * EDGES
            q_at = q_ptr + (one // kv_heads) * s_batch + (one % kv_heads) * GROUP * s_head
            average = tl.arange(0, LISTS * PADDED)
            tl.store(bar_ptr + average, -bound, mask=average < LISTS * OF_LIST)
            for at in tl.range(0, own, disable_licm=True):
                group_list(
                    q_at, source_ptr + (row + at) * EACH,
                    directions_ptr + (one * sorts + (begin + at) // SORTED) * COLUMNS * DIM,
                    query_ptr + at * OF_LIST * DIM, spread_ptr + at * 2 * DIM, log_rows_ptr + at * OF_LIST,
                    scale, queries, s_head, s_query,
                    EACH, ROWS, OF_LIST, PADDED, DIM, WIDTH, SLICE, COLUMNS, STEPS, ROUGH,
                )  # fmt: skip
            known = tl.load(edge_at + EDGES - 1).to(tl.int32)
            keys_at, log_value_at = keys_ptr + one * blocks * DIM, log_value_ptr + one * blocks
            level = 0
            if SEVERAL:
                level = _level(tile, first_tile, length, step, tile_size, keys, most, levels)
            count = known >> 2 * level
            number_blocks(numbers_ptr, count, WRITTEN)
            if SEVERAL:
                variance_at = variance_ptr + one * (blocks - keys) * DIM
                for opening in tl.range(0, level, disable_licm=True):
                    above = level - opening
                    size, before = tl.full([], 1, tl.int32) << 2 * above, blocks_before(keys, above)
                    keys_of, variance_of = keys_at + before * DIM, variance_at + (before - keys) * DIM
                    _sums(
                        query_ptr, spread_ptr, log_rows_ptr, keys_of, variance_of, numbers_ptr, bar_ptr, own, count, size,
                        bound, OF_LIST, DIM, True, False, LISTS, AVERAGES, WIDTH, SUMMED,
                    )  # fmt: skip
                    share_keys(
                        query_ptr, bar_ptr, spread_ptr, keys_of, variance_of, log_value_at + before, numbers_ptr, share_ptr,
                        edge_at, own, room, size, count,
                        OF_LIST, DIM, DEVIATIONS, True, LISTS, GROUPS, WIDTH, WITHIN, 2, "ieee",
                    )  # fmt: skip
                    tl.debug_barrier()
                    wanted = tl.cdiv(tl.where(above == 1, candidates, wider * candidates), 4)
                    found = find_largest(share_ptr, numbers_ptr, opened_ptr, count, wanted, BITS, DIGIT, COUNTED, TAKEN)
                    _sums(
                        query_ptr, spread_ptr, log_rows_ptr, keys_of, variance_of, opened_ptr, bar_ptr, own, found, size,
                        bound, OF_LIST, DIM, True, True, LISTS, AVERAGES, WIDTH, SUMMED,
                    )  # fmt: skip
                    # with what stands behind the last whole block
                    last = known >> 2 * above
                    count = open_blocks(opened_ptr, numbers_ptr, found, 4 * last, known >> 2 * (above - 1), WRITTEN)
            size = tl.full([], 1, tl.int32)
            _sums(
                query_ptr, spread_ptr, log_rows_ptr, keys_at, keys_at, numbers_ptr, bar_ptr, own, count, size,
                bound, OF_LIST, DIM, False, False, LISTS, AVERAGES, WIDTH, SUMMED,
            )  # fmt: skip
            left_begin, left_end = tl.load(edge_at).to(tl.int32), tl.load(edge_at + 3).to(tl.int32)
            hole_begin, hole_end = tl.load(edge_at + 1).to(tl.int32), tl.load(edge_at + 2).to(tl.int32)
            count = keep_left(numbers_ptr, count, left_begin, hole_begin, hole_end, left_end, WRITTEN)
            share_keys(
                query_ptr, bar_ptr, spread_ptr, keys_at, keys_at, log_value_at, numbers_ptr, share_ptr, edge_at,
                own, room, size, count,
                OF_LIST, DIM, DEVIATIONS, False, LISTS, GROUPS, WIDTH, KEYS, STAGES, "ieee",
            )  # fmt: skip
            tl.debug_barrier()
            draw_lists(
                share_ptr, numbers_ptr, edge_at, noise_ptr, index_ptr, weight_ptr, low_ptr, high_ptr, row, own, count,
                room, num, even, least,
                LISTS, ROUNDS, ALL, SHIFT, PLACES, PLACED, SLOTS, DIGITS,
            )  # fmt: skip
        tl.debug_barrier()


def launch_choice(
    given: tuple[Tensor, ...], blocks: tuple[Tensor, ...], results: tuple[Tensor, ...], memory: tuple[Tensor, ...],
    plan: AlikePlan, scale: float, deviations: float, bound: float, even: float, least: float,
) -> Launch:  # fmt: skip
    """Prepare the launch of `operator_alike.choose_alike`, which writes into `results`."""
    q, source, directions, edges, noise = given
    keys, variance, log_value = blocks
    index, weight, low, high = results
    query, spread, log_rows, bar, share, numbers = memory
    q, (rows, tiles) = q if q.stride(3) == 1 else q.contiguous(), edges.shape[:2]
    each, width, lists, num = source.shape[2], q.shape[3], share.shape[1], index.shape[2]
    padded, broad, long = (triton.next_power_of_2(x) for x in (plan.groups, max(16, width), max(16, each)))
    several = plan.levels > 1
    # half as many at once of what takes more registers: many wide averages; and blocks, which have variances
    many = _KEYS // (1 + (padded * broad > 2048))
    return Launch(
        _kernel,
        (len(query),),
        {
            "q_ptr": q, "source_ptr": source, "directions_ptr": directions, "edges_ptr": edges, "noise_ptr": noise,
            "keys_ptr": keys, "variance_ptr": variance, "log_value_ptr": log_value,
            "index_ptr": index, "weight_ptr": weight, "low_ptr": low, "high_ptr": high, "query_ptr": query,
            "spread_ptr": spread, "log_rows_ptr": log_rows, "bar_ptr": bar, "share_ptr": share, "numbers_ptr": numbers,
            "scale": scale, "queries": q.shape[2], "kv_heads": rows // q.shape[0], "sorts": directions.shape[1],
            "tiles": tiles,
            "s_batch": q.stride(0), "s_head": q.stride(1), "s_query": q.stride(2), "first_tile": plan.first_tile,
            "length": plan.length, "step": plan.step, "tile_size": plan.size, "keys": plan.keys, "most": plan.most,
            "levels": plan.levels, "blocks": keys.shape[1],
            "together": plan.together(rows), "lists": rows, "turns": plan.turns(rows, tiles, width),
            "room": share.shape[2], "units": numbers.shape[1], "behind": plan.behind, "num": num,
            "own": plan.own(width), "candidates": plan.candidates, "wider": plan.wider,
            "even": even, "least": least, "bound": bound, "GROUP": q.shape[1] * q.shape[0] // rows, "MANY": plan.many,
            "SORTED": source.shape[1] // directions.shape[1],
            "EACH": each, "ROWS": long, "OF_LIST": plan.groups, "PADDED": max(_LEAST, padded), "DIM": width,
            "WIDTH": broad, "SLICE": min(broad, max(16, _NUMBERS // long)), "COLUMNS": DIRECTIONS, "STEPS": plan.steps,
            "EDGES": edges.shape[2],
            "AVERAGES": min(_ROWS // (1 + (broad > 128)), max(_LEAST, lists * padded)), "SUMMED": _SUMMED,
            "DEVIATIONS": deviations, "LISTS": lists, "GROUPS": padded,
            "KEYS": many, "WITHIN": many // (1 if broad <= 64 else 2), "STAGES": 3 if broad <= 128 else 2,
            "ROUNDS": plan.rounds, "ALL": UNITS, "SHIFT": 62 - num.bit_length(), "PLACES": _PLACES // lists,
            "PLACED": _PLACED // lists, "SLOTS": _SLOTS // lists, "SEVERAL": several,
            # queries are estimates once they are compared; averages are in bfloat16, and only tests have wider ones
            "ROUGH": "ieee" if torch.version.hip else "tf32",
            "BITS": 8 * share.element_size(), "DIGIT": _DIGIT, "COUNTED": _COUNTED, "TAKEN": _TAKEN, "WRITTEN": _WRITTEN,
            "DIGITS": plan.units.bit_length(),
            "num_warps": 4 if long * broad * q.element_size() <= _BYTES else 8, "num_stages": 1,
        },
    )  # fmt: skip
