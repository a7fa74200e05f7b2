r"""Context parallelism: the bytes that cross the wire, beside ring attention and an all-gather; and what few bytes cost.

    python benchmarks/distributed.py bytes --tokens 131072 --ranks 8     # processes of this machine; the exchange is real
    python benchmarks/distributed.py error --tokens 32768                # structured inputs, one process
    python benchmarks/long_context.py --documents 4 --methods pooled:2048:16384:2048 control:2688 \
        --out benchmarks/records/distributed.jsonl
    python benchmarks/distributed.py --show

Every case adds lines to the file of records. In `bytes` all three ways run in one call of this script: the exchange of
`PooledChunks`, ring attention (rounds in which every rank passes keys and values on; its arithmetic is left out), and the
all-gather that `gather=True` makes. A line holds the bytes of every rank, in bfloat16.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import hyperattention as ha
from hyperattention.distributed import Contiguous, PooledChunks
from hyperattention.distributed.exchange import Exchange
from hyperattention.distributed.group import Group
from hyperattention.distributed.header import Header, agree
from hyperattention.distributed.plan import Plan, way_of
from hyperattention.distributed.traffic import Round, Traffic
from hyperattention.files.records import environment
from hyperattention.pooled.route import Route
from hyperattention.problem import Problem
from hyperattention.synthetic import LOW_RANK, SCATTERED, Inputs, structured

RECORDS = Path(__file__).parent / "records" / "distributed.jsonl"
HEAD_DIM = 128
KINDS = {"scattered": SCATTERED, "low-rank": LOW_RANK}


def write(path: Path, record: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record | environment()) + "\n")
    print(json.dumps(record), flush=True)


def loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def ring(group: Group, kv: Tensor) -> None:
    """Pass keys and values around the ring, as ring attention does; what is there after each round is not read here."""
    rows, nothing = torch.arange(len(kv)), torch.empty(0, dtype=torch.int64)
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sent, received = ([len(kv) * (rank == other) for rank in range(group.size)] for other in (after, before))
    for _ in range(group.size - 1):
        kv = group.move(Route("ring", rows, tuple(sent), rows, tuple(received), nothing, nothing, len(kv)), kv)


def inputs(options: argparse.Namespace) -> Inputs:
    return structured(options.tokens, heads=options.heads, head_dim=HEAD_DIM, kind=KINDS[options.heads_of])


def save_shards(made: Inputs, ranks: int, folder: Path) -> None:
    tensors = [torch.tensor_split(x.to(torch.bfloat16), ranks, 2) for x in (made.q, made.k, made.v)]
    for rank, own in enumerate(zip(*tensors, strict=True)):
        torch.save([x.contiguous() for x in own], folder / f"{rank}.pt")


@dataclass(frozen=True)
class Ran:
    """The rounds of one way, and the seconds that it took with its arithmetic."""

    rounds: list[Round]
    seconds: float


def three_ways(process_group: dist.ProcessGroup, method: PooledChunks, shard: list[Tensor]) -> dict[str, Ran]:
    """Exchange for real; no way computes attention."""
    q, k, v = shard
    device, found = torch.device("cpu"), {}
    for name, run, gather in (("pooled", method, False), ("all-gather", ha.Exact(), True)):
        group, way, began = Group(process_group, device), way_of(run, gather), time.perf_counter()
        plan = Plan.of(group, way, Contiguous().segments([q.shape[2]] * group.size), not gather)
        problem = Problem(q, k, v, HEAD_DIM**-0.5, causal=not gather)
        if not gather:
            # every call begins so
            agree(group, Header(q.shape[2], {}))
        with torch.no_grad():
            Exchange(group, plan, way, problem).read(q, torch.cat([k, v], 3))
        found[name] = Ran(group.rounds, time.perf_counter() - began)
    group, began = Group(process_group, device), time.perf_counter()
    ring(group, torch.cat([k, v], 3).flatten(0, 2))
    return found | {"ring": Ran(group.rounds, time.perf_counter() - began)}


def count(rank: int, options: argparse.Namespace, folder: Path, answers) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=options.ranks, timeout=timedelta(minutes=30)
    )
    mesh = init_device_mesh("cpu", (options.ranks,))
    ways = three_ways(
        mesh.get_group(),
        PooledChunks(chunk=options.chunk, num=options.num, averages=options.averages),
        torch.load(folder / f"{rank}.pt"),
    )
    answers.put((rank, {name: (Traffic.of(ran.rounds, 0), ran.seconds) for name, ran in ways.items()}))
    dist.barrier()
    dist.destroy_process_group()


def run_bytes(options: argparse.Namespace) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        save_shards(inputs(options), options.ranks, Path(folder))
        processes = [
            context.Process(target=count, args=(rank, options, Path(folder), answers), daemon=True)
            for rank in range(options.ranks)
        ]
        for process in processes:
            process.start()
        found = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    for way in ("pooled", "all-gather", "ring"):
        traffic, seconds = zip(*(found[rank][way] for rank in range(options.ranks)), strict=True)
        sent, received = (
            [sum(side.values()) for side in sides] for sides in zip(*((x.sent, x.received) for x in traffic), strict=True)
        )
        write(
            options.out,
            {
                "kind": "bytes", "way": way, "tokens": options.tokens, "ranks": options.ranks, "heads": options.heads,
                "heads_of": options.heads_of, "head_dim": HEAD_DIM, "dtype": "bfloat16",
                "chunk": options.chunk, "num": options.num, "averages": options.averages, "sent": sent,
                "received": received, "most": max(sent + received), "rounds": traffic[0].rounds,
                "by_purpose": [{"sent": each.sent, "received": each.received} for each in traffic],
                "seconds": max(seconds),
            },
        )  # fmt: skip


def run_error(options: argparse.Namespace) -> None:
    made = inputs(options)
    pooled = PooledChunks(chunk=options.chunk, num=options.num, averages=options.averages)
    pairs = pooled.cost(options.tokens).pairs
    control = ha.Method(ha.Sinks(16), ha.Window(192), ha.Draw(round(pairs) - 208), tile=128)
    methods = {"pooled": pooled, "control": control, "default": ha.default_method(10**9)}
    for name, method in methods.items():
        for seed in range(options.seeds):
            began = time.perf_counter()
            with torch.no_grad():
                out = ha.attention(made.q, made.k, made.v, is_causal=True, method=method, seed=seed)
            seconds = time.perf_counter() - began
            report = ha.audit(
                made.q, made.k, made.v, out, rows=512, is_causal=True, seed=seed, method=method, hardness=False
            )
            write(
                options.out,
                {
                    "kind": "error", "name": name, "method": repr(method), "tokens": options.tokens, "seed": seed,
                    "heads": options.heads, "heads_of": options.heads_of, "head_dim": HEAD_DIM, "dtype": "float32",
                    "error": report.relative_error.mean().item(), "by_head": report.relative_error.flatten().tolist(),
                    "pairs": method.cost(options.tokens).pairs, "seconds": seconds,
                },
            )  # fmt: skip


def show(path: Path) -> None:
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        if record["kind"] == "bytes":
            print(f"{record['tokens']} tokens, {record['ranks']} ranks, {record['way']}: "
                  f"{record['most'] / 2**20:.2f} MiB through the busiest rank, {record['rounds']} rounds")  # fmt: skip
        if record["kind"] == "long_context":
            print(f"{record['length']} bytes of the reference model, {record['name']}: {record['nats_per_byte']:.4f} nats a "
                  f"byte, {record['retrieval']:.3f} retrieved, {record['pairs']:.0f} pairs")  # fmt: skip
        if record["kind"] == "error":
            print(f"{record['tokens']} tokens, {record['name']}, seed {record['seed']}: error {record['error']:.4f}, "
                  f"{record['pairs']:.0f} pairs, {record['seconds']:.1f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=("bytes", "error"))
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--heads-of", choices=tuple(KINDS), default="low-rank", help="kind of the structured heads")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=16_384)
    parser.add_argument("--num", type=int, default=2048)
    parser.add_argument("--averages", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--show", action="store_true", help="print what is recorded, and measure nothing")
    options = parser.parse_args()
    if options.kind == "bytes":
        run_bytes(options)
    elif options.kind == "error":
        run_error(options)
    show(options.out)


if __name__ == "__main__":
    main()
