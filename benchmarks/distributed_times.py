"""Times on the wire, without arithmetic: rounds of many sizes, and what `PooledChunks`, a ring and an all-gather move.

    python benchmarks/distributed_times.py                            # processes over the loopback device
    unshare -n python benchmarks/distributed_times.py --links 1000    # as root: links of 1000 Mbit/s each way
    python benchmarks/distributed_check.py                            # predicts the second from the first

Each way exchanges once for real, and its messages are noted. Then they are sent again, byte for byte, with nothing between
rounds, in turn with rounds of two plain patterns: the first rank sends as much to each other one (`spread`), and every rank
does (`alike`). A time is that of the last rank, from the moment when all had begun. The loopback device has no rate of its
own: all bytes pass the cores that the processes share. With `--links` every process is in a network namespace of its own,
behind a token bucket in each direction (`tc`, of iproute2), so that each has a link to a switch, as GPUs have. On a machine
that others use, `chrt -f 1` before `python` lets the ranks run as soon as a message wakes them.
"""

import argparse
import ctypes
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from distributed import KINDS, RECORDS, loopback, save_shards, three_ways, write
from torch.distributed.device_mesh import init_device_mesh

from hyperattention.bench.timing import Timing
from hyperattention.distributed import PooledChunks, Traffic
from hyperattention.distributed.traffic import Round
from hyperattention.synthetic import structured

PATTERNS = ("alike", "spread")
RANKS, TOKENS, NUM, AVERAGES = (2, 4), (8192, 16_384, 32_768), 1024, 1024
SIZES = tuple(2**power for power in range(10, 25))
# rounds of one size that follow one another, and bytes of all of them: many times what a token bucket holds
FEW, MANY, TOGETHER = 2, 32, 2**22
NEW_NETWORK = 0x40000000


@dataclass(frozen=True)
class Link:
    """A rank's own link to a switch.

    Args:
        rank: the rank.
        rate: Mbit a second, each way.
    """

    rank: int
    rate: int

    def leave(self) -> None:
        """Move this process out of the network of the others; threads that it starts from now on go with it."""
        if ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "this process may not make a network namespace: run as root")

    def plug_in(self, process: int) -> None:
        """Connect the process of the rank to the switch, in the network of the caller."""
        here, there = f"switch{self.rank}", f"rank{self.rank}"
        _run(f"ip link add {here} type veth peer name {there} netns {process}")
        _run(f"ip link set {here} master switch up")
        self._limit(here)

    def take(self) -> None:
        """Set up the rank's end, in the network of the rank."""
        _run("ip link set lo up")
        _run(f"ip addr add 10.9.0.{self.rank + 1}/24 dev rank{self.rank}")
        _run(f"ip link set rank{self.rank} up")
        self._limit(f"rank{self.rank}")

    def _limit(self, device: str) -> None:
        # no packet may be lost: the queue holds what all ranks send to one of them
        _run(f"tc qdisc add dev {device} root tbf rate {self.rate}mbit burst 128kb limit 128mb")


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)


@dataclass(frozen=True)
class Sequence:
    """Rounds of one rank that follow one another, with the memory that they need."""

    rounds: tuple[tuple[list[int], list[int]], ...]
    data: torch.Tensor
    buffer: torch.Tensor

    @classmethod
    def of(cls, rounds: Iterable[tuple[list[int], list[int]]]) -> "Sequence":
        rounds = tuple(rounds)
        data, buffer = (torch.zeros(max(sum(each[side]) for each in rounds), dtype=torch.uint8) for side in (0, 1))
        return cls(rounds, data, buffer)

    def run(self) -> tuple[float, float]:
        """Give the times of begin and end, of a clock that all processes of a machine share."""
        ready = torch.zeros(dist.get_world_size(), dtype=torch.uint8)
        dist.barrier()
        dist.all_to_all_single(ready.clone(), ready)
        began = time.perf_counter()
        for sent, received in self.rounds:
            dist.all_to_all_single(self.buffer[: sum(received)], self.data[: sum(sent)], received, sent)
        return began, time.perf_counter()


def plain(pattern: str, size: int, rank: int, ranks: int) -> list[tuple[list[int], list[int]]]:
    """Give the rounds of a rank in which so many bytes pass the first one, each way or only out."""
    each = size // (ranks - 1)
    matrix = [[each * (to != own and (pattern == "alike" or own == 0)) for to in range(ranks)] for own in range(ranks)]
    return [(matrix[rank], [row[rank] for row in matrix])] * max(FEW, min(MANY, TOGETHER // size))


def work(rank: int, ranks: int, options: argparse.Namespace, folder: Path, answers, plugged) -> None:
    torch.set_num_threads(1)
    if options.links:
        link = Link(rank, options.links)
        link.leave()
        answers.put((rank, os.getpid()))
        plugged.wait()
        link.take()
        os.environ["GLOO_SOCKET_IFNAME"] = f"rank{rank}"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
    )
    group = init_device_mesh("cpu", (ranks,)).get_group()
    noted: dict[tuple[str, int], list[Round]] = {}
    for tokens in TOKENS:
        shard = torch.load(folder / str(tokens) / f"{rank}.pt")
        ways = three_ways(group, PooledChunks(chunk=tokens // ranks, num=NUM, averages=AVERAGES), shard)
        noted |= {(way, tokens): ran.rounds for way, ran in ways.items()}
    sequences = {
        name: Sequence.of((list(each.sent), list(each.received)) for each in rounds) for name, rounds in noted.items()
    }
    sequences |= {(pattern, size): Sequence.of(plain(pattern, size, rank, ranks)) for pattern in PATTERNS for size in SIZES}
    times = [{name: each.run() for name, each in sequences.items()} for _ in range(options.turns + 1)]
    # the first turn opens connections and touches memory
    answers.put((rank, (times[1:], noted)))
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, options: argparse.Namespace) -> list[tuple[list, Mapping]]:
    context = multiprocessing.get_context("spawn")
    answers, plugged = context.Queue(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        for tokens in TOKENS:
            (Path(folder) / str(tokens)).mkdir()
            made = structured(tokens, heads=1, head_dim=128, kind=KINDS["low-rank"])
            save_shards(made, ranks, Path(folder) / str(tokens))
        entered = ranks, options, Path(folder), answers, plugged
        processes = [context.Process(target=work, args=(rank, *entered), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        if options.links:
            for rank, process in sorted(answers.get() for _ in processes):
                Link(rank, options.links).plug_in(process)
            plugged.set()
        found = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in range(ranks)]


def seconds_of(found: list[tuple[list, Mapping]], name: tuple[str, int]) -> Timing:
    """Give the time of each turn, from the last begin to the last end."""
    turns = zip(*([turn[name] for turn in times] for times, _ in found), strict=True)
    return Timing(tuple(max(end for _, end in turn) - max(begin for begin, _ in turn) for turn in turns))


def run(ranks: int, options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    found = measure(ranks, options)
    fixed = {
        "kind": "times", "wire": f"links of {options.links} Mbit/s" if options.links else "loopback", "ranks": ranks,
        "turns": options.turns, "load": load,
    }  # fmt: skip
    for pattern, size in itertools.product(PATTERNS, SIZES):
        timing, rounds = seconds_of(found, (pattern, size)), plain(pattern, size, 0, ranks)
        part = {"way": pattern, "bytes": sum(rounds[0][0]), "rounds": len(rounds)}
        write(options.out, fixed | part | {"median_s": timing.median, "quartiles_s": timing.quartiles})
    for way, tokens in found[0][1]:
        timing, rounds = seconds_of(found, (way, tokens)), [noted[way, tokens] for _, noted in found]
        # by rank: bytes of each round
        moved = {side: [[sum(getattr(each, side)) for each in own] for own in rounds] for side in ("sent", "received")}
        part = {"way": way, "tokens": tokens, "num": NUM, "averages": AVERAGES, "rounds": len(rounds[0])} | moved
        part["most"] = max(Traffic.of(own, 0).most for own in rounds)
        part["purposes"] = [each.purpose for each in rounds[0]]
        write(options.out, fixed | part | {"median_s": timing.median, "quartiles_s": timing.quartiles})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--links", type=int, default=0, help="Mbit a second of each process's own link; 0 for the loopback")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.links:
        _run("ip link add switch type bridge")
        _run("ip link set switch up")
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    for ranks in RANKS:
        run(ranks, options)


if __name__ == "__main__":
    main()
