"""Estimate what a list of draws for alike queries would cost an H100 in fused kernels: prices, not measurements.

    python benchmarks/gpu/prices.py                       # a few settings at 8k to a million tokens
    python benchmarks/gpu/prices.py 1216:64:8 --tokens 32768
    python benchmarks/gpu/prices.py 640:64:16  # the default

32 query heads on 8 kv heads, width 128, bfloat16, causal. The price of a slot is that of the list kernel on one H100,
derived from `benchmarks/records/gpu_list.jsonl`, without what lays lists out. The prices of scores and of passes over memory
are those of prototypes of fused kernels on one H100, typed in by hand: no record backs them. Blocks of keys are scored
twice, for the sums and for the shares, and those that are opened once more; keys are scored twice. Each pass takes its
products, or
what it reads out of the second-level cache, whichever is longer; beside that there are the instructions that find the blocks
to open. Shares of keys are written and read once, two bytes each, or take the time of the instructions that draw by them,
whichever is longer; that other programs score meanwhile is not counted. Sorting and grouping wait for
themselves: their times are cycles counted by hand, which no card has shown. Launches are those that `counts.py --call`
counts, on the device; the host needs five times as long for them.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.counts import count_call
from hyperattention import Method, Sinks, Window
from hyperattention.select import DrawAlike
from hyperattention.select.score.alike_scan import WIDER
from hyperattention.select.score.block_sizes import OPENED, BlockSizes

HEADS, KV_HEADS, HEAD_DIM, TILE = 32, 8, 128, 128
PARTS = ("lists", "blocks", "keys", "draws", "sorting", "rows", "launches")
RECORDS = Path(__file__).resolve().parents[1] / "records" / "gpu_list.jsonl"
# products of a score and of an output, a multiplication and an addition for each number of a key and of a value
FLOP_OF_A_PAIR = 2 * 2 * HEAD_DIM
# FLOP/s of scores where each key read serves 128 rows or more: measured on an H100 with a prototype that is not in this
# repository, nor is its run among the records; about half of what `torch.mm` reaches (`ceilings` in records/gpu.jsonl)
FLOPS = 375e12
# bytes/s of a pass over memory, 1.2 ms for 2 GB: measured in the same way, and as little backed by a record; about half of
# what a copy reaches (`ceilings` in records/gpu.jsonl)
BYTES = 2e9 / 1.2e-3
# instructions that draw by a share: seven passes, counted in what Triton 3.9 compiles for sm_90, with two draws of
# the busiest block; and those that a GPU runs in a second, 128 a cycle on 132 multiprocessors
INSTRUCTIONS, INSTRUCTIONS_A_SECOND = 118, 132 * 128 * 1.7e9
# bytes/s that multiprocessors read from the second-level cache: assumed, from what others have published of an H100; neither
# measured here nor in a record
CACHED_BYTES = 5.5e12
# instructions that find the largest shares, for each: five passes that compare it with eight thresholds, and one that
# gives it a place, 207 and 583 for eight of them, counted as above
INSTRUCTIONS_OF_A_BLOCK = (5 * 207 + 583) / 8
# programs of a GPU that sort or group at once, two on a multiprocessor, and how long one takes: 75,000 cycles for a tile of
# 512 rows (passes over them, 64 steps of Gram-Schmidt, 7 cuts) and 10,000 for a list of 64, counted by hand
PROGRAMS, SECONDS_OF_A_SORT, SECONDS_OF_A_GROUPING = 2 * 132, 75e3 / 1.7e9, 10e3 / 1.7e9
# a launch on the device
SECONDS_OF_A_LAUNCH = 4e-6


def seconds_of_a_slot(tile: int) -> float:
    """What a slot and token of all heads took in the list kernel, for lists of so many positions, at 131,072 tokens.

    The record's rate is of the pairs listed, whatever their number was.
    """
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    case = f"drawn, tiles of {tile}"
    (record,) = (each for each in records if each.get("case") == case and each["keys"] == 131_072 and "ms" in each)
    return HEADS * FLOP_OF_A_PAIR / (1e12 * record["tflop_per_s"]["new, flattened"])


def price(stage: DrawAlike, tokens: int) -> dict[str, float]:
    """Estimate milliseconds of each part."""
    method = Method(Sinks(16), Window(192), stage, tile=TILE)
    slots = method.cost(tokens).pairs
    sizes = BlockSizes(stage.most)
    blocks = keys = opened = 0
    # every tile of 128 positions
    for seen in range(TILE, tokens + 1, TILE):
        size = sizes.size(seen)
        units = seen // size
        while size > 1:
            wanted = stage.num * stage.candidates * (1 if size == OPENED else WIDER) // OPENED
            opened, blocks, size = opened + min(units, wanted), blocks + units, size // OPENED
            units = OPENED * min(units, wanted)
        keys += units
    many = HEADS // KV_HEADS * TILE // stage.rows
    averages = many * stage.pooled
    tiles, lists = KV_HEADS * tokens / TILE, HEADS * tokens / stage.rows
    seconds = {
        "lists": tokens * slots * seconds_of_a_slot(64 if stage.rows >= 256 else 16),
        "blocks": KV_HEADS * seconds_of_blocks(stage, blocks, opened),
        # for the sums, and for the shares, with one column for each list: the allowance
        "keys": KV_HEADS * keys * (seconds_of_a_pass(averages, 1) + seconds_of_a_pass(averages + many, 1)),
        "draws": KV_HEADS * many * keys * max(2 * 2 / BYTES, INSTRUCTIONS / INSTRUCTIONS_A_SECOND),
        "sorting": (tiles * SECONDS_OF_A_SORT + lists * SECONDS_OF_A_GROUPING) / PROGRAMS,
        # queries read and written sorted; outputs of both lists read, and merged ones written
        "rows": 5 * 2 * HEADS * HEAD_DIM * tokens / BYTES,
        "launches": launches(stage, tokens) * SECONDS_OF_A_LAUNCH,
    }
    per_query = stage.selection_pairs(tokens, TILE, HEAD_DIM, True)
    return {"pairs": slots, "products": per_query} | {name: 1e3 * each for name, each in seconds.items()}


def seconds_of_a_pass(columns: float, tensors: int) -> float:
    """What a block takes in a pass that multiplies it by so many columns in all, and reads one or two rows of it."""
    return max(columns * 2 * HEAD_DIM / FLOPS, tensors * 2 * HEAD_DIM / CACHED_BYTES)


def seconds_of_blocks(stage: DrawAlike, blocks: int, opened: int) -> float:
    """What scoring and opening blocks takes, for so many of all tiles of one kv head: means and variances in the sums."""
    many = HEADS // KV_HEADS * TILE // stage.rows
    averages = many * stage.pooled
    sums, shares = seconds_of_a_pass(averages, 2), seconds_of_a_pass(averages + many, 2)
    return blocks * (sums + shares + INSTRUCTIONS_OF_A_BLOCK / INSTRUCTIONS_A_SECOND) + opened * sums


def launches(stage: DrawAlike, tokens: int) -> int:
    """Count the launches of a call: see `counts.py`."""
    return count_call(Method(Sinks(16), Window(192), stage, tile=TILE), tokens).launches.total()


def stage_of(text: str) -> DrawAlike:
    """Read ``num:rows:pooled:most:candidates``, of which the last ones may be missing."""
    names = "num", "rows", "pooled", "most", "candidates"
    return DrawAlike(**dict(zip(names, map(int, text.split(":")), strict=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    settings = ["640:64:16", "1216:64:16", "880:64:8", "640:64:16:4096"]
    parser.add_argument("stage", nargs="*", default=settings)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16_384, 32_768, 131_072, 1_048_576])
    options = parser.parse_args()
    for text in options.stage:
        stage = stage_of(text)
        print(stage)
        for tokens in options.tokens:
            parts = price(stage, tokens)
            total = sum(parts[name] for name in PARTS)
            print(f"  {tokens:>9,} tokens: {total:7.2f} ms = " + ", ".join(f"{name} {x:.4g}" for name, x in parts.items()))


if __name__ == "__main__":
    main()
