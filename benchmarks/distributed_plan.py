"""Host time of planning one call among many ranks; no process is needed, since every rank plans alone.

    python benchmarks/distributed_plan.py

"Planned": cells, moves and routes of all exchanges of a call whose layout is new, for the first, a middle and the last rank;
the slowest counts. "Again": the same with what is kept from the call before, as every further layer and step has it.
"Choice": all of `choose` for shards of 128 tokens, nearly all of it host time, on a world that moves nothing. Medians.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from distributed import HEAD_DIM, RECORDS, write
from torch import Tensor

from hyperattention.bench.timing import Timing
from hyperattention.distributed import Contiguous, PooledChunks
from hyperattention.distributed.plan import Plan, Way, way_of
from hyperattention.methods.pooled_reader import near_route
from hyperattention.pooled.book import book_of
from hyperattention.pooled.choose import choose
from hyperattention.pooled.pool import Near, Shard
from hyperattention.pooled.route import Route, World, route_of

RANKS, TOKENS = (8, 64, 256, 1024), 128
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Nowhere(World):
    """Ranks that do not exist; nothing arrives from them."""

    number: int
    ranks: int

    @property
    def rank(self) -> int:
        return self.number

    @property
    def size(self) -> int:
        return self.ranks

    def move(self, route: Route, x: Tensor) -> Tensor:
        return x.new_zeros(route.rows, x.shape[1])


def plan_of(world: Nowhere, way: Way, tokens: int) -> Plan:
    return Plan.of(world, way, Contiguous().segments([tokens] * world.size), True)


def routes(world: Nowhere, way: Way, tokens: int) -> list[Route]:
    """Plan a call whose shards hold so many tokens; another number is another layout."""
    layout = plan_of(world, way, tokens).layout
    assert way.pooled is not None
    book = book_of(layout, world.rank, way.pooled.sizes.groups)
    moves = {"averages": book.outward, "sums": book.inward, "totals": book.outward}
    moves |= {"counts": book.forward, "replies": book.back}
    found = [route_of(name, world, each, 1, CPU) for name, each in moves.items()]
    return [*found, near_route(world, layout, 1, CPU)]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(world: Nowhere, turns: int) -> dict[str, Timing]:
    way = way_of(PooledChunks(chunk=TOKENS, num=1024, averages=4, near=TOKENS), False)
    assert way.sizes is not None
    sizes, layout = way.sizes, plan_of(world, way, TOKENS).layout
    q = torch.randn(1, 1, TOKENS, HEAD_DIM)
    shard = Shard(q, q, None, None, 1.0, 0, 0, torch.zeros(1, dtype=torch.int64))
    spans = [layout.grid.local(cell) for cell in layout.queries if cell.rank == world.rank]
    near = Near(torch.randn(1, 1, sum(high - low for low, high in spans), HEAD_DIM), None)
    found: dict[str, list[float]] = {"planned": [], "again": [], "choice": []}
    for turn in range(turns):
        # two to six chunks a rank: every turn has a layout of its own
        new = TOKENS * (turn + 2)
        found["planned"].append(seconds(lambda new=new: routes(world, way, new)))
        found["again"].append(seconds(lambda new=new: routes(world, way, new)))
        found["choice"].append(seconds(lambda: choose(world, layout, shard, near, sizes)))
    return {name: Timing(tuple(each)) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for ranks in RANKS:
        load = os.getloadavg()[0]
        found = [measure(Nowhere(rank, ranks), options.turns) for rank in (0, ranks // 2, ranks - 1)]
        for name in found[0]:
            slowest = max((each[name] for each in found), key=lambda timing: timing.median)
            record = {"kind": "plan", "part": name, "ranks": ranks, "turns": options.turns, "load": load}
            write(options.out, record | {"median_s": slowest.median, "quartiles_s": slowest.quartiles})


if __name__ == "__main__":
    main()
