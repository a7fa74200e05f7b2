"""What a decoding step costs from a cache of a sixteenth: time, memory, upkeep and error, beside exact attention.

    python benchmarks/cache_decode.py                       # some minutes on two cores
    python benchmarks/cache_decode.py --toy --out /tmp/d.jsonl   # to see that the script runs; says nothing

Exact attention is torch's SDPA over keys and values that lie in order, called in the quicker of two ways: heads as the model
has them, or the heads of a group as rows of one. The cache's own kernel over all keys is exact as well, and may be quicker
still: the speedup over the quickest of all stands beside. Inputs are structured ones; every step has its own query, key and
value. Lines of kind "figure" are what is claimed, the others what it rests on.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from claims import announce, at_least, figure
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hyperattention.bench.timing import Timing, speedup
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.store import Store
from hyperattention.coreset import Coreset
from hyperattention.files.records import write_records
from hyperattention.policies.cluster_means import ClusterMeans
from hyperattention.policies.latest import Latest
from hyperattention.policies.top_pages import TopPages
from hyperattention.policies.uniform_sample import UniformSample
from hyperattention.synthetic import Inputs, structured

OUT = Path(__file__).parent / "records" / "cache_decode.jsonl"


@dataclass(frozen=True)
class Plan:
    keys: int = 32768
    # query heads, kv heads, width
    shapes: tuple[tuple[int, int, int], ...] = ((8, 8, 64), (32, 8, 128))
    share: int = 16
    # of each seed
    steps: int = 256
    seeds: int = 3


TOY = Plan(2048, ((4, 2, 16),), 16, 40, 2)


@dataclass(frozen=True)
class Steps:
    """What one store did in all steps: times, errors, bytes and slots read."""

    attend: Timing
    upkeep: Timing
    error: float
    memory_bytes: int
    slots: int
    approximated: int


def stores(room: CacheBudget) -> dict[str, Store]:
    """Who takes part; the first is the default, the second the control."""
    return {
        "cluster means (default)": CompressingStore(ClusterMeans(), room),
        "uniform sample (control)": CompressingStore(UniformSample(), room),
        "streaming": CompressingStore(Latest(), room),
        "pages, nothing dropped": TopPages().store(
            CacheBudget(room.budget, room.sinks, min(128, room.budget // 16)), 0, 0, None
        ),
    }


def exact_calls(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
    return (
        lambda: scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]),
        lambda: scaled_dot_product_attention(rows, k, v).flatten(1, 2)[:, :, None],
    )


def timed(call) -> tuple[float, Tensor]:
    began = time.perf_counter()
    out = call()
    return time.perf_counter() - began, out


def run(inputs: Inputs, plan: Plan) -> tuple[Timing, Timing, dict[str, Steps]]:
    """Decode the last tokens, every step by everyone in turn."""
    q, k, v = inputs.q, inputs.k, inputs.v
    start, scale = plan.keys - plan.steps, q.shape[3] ** -0.5
    budget = plan.keys // plan.share
    held = stores(CacheBudget(budget, min(16, budget // 8), budget // 2))
    for store in held.values():
        store.append(k[:, :, :start], v[:, :, :start])
        store.end_step(q[:, :, :start], scale)
    weight = torch.zeros(k.shape[:3])
    exact, own, spent = [], [], {name: ([], [], []) for name in held}
    for at in range(start, plan.keys):
        step = slice(at, at + 1)
        begin = at - start
        ways = [timed(call) for call in exact_calls(q[:, :, step], k[:, :, : at + 1], v[:, :, : at + 1])]
        exact.append(min(seconds for seconds, _ in ways))
        whole = Coreset(*(x[:, :, : at + 1] for x in (k, v, weight)))
        own.append(timed(lambda whole=whole, step=step: whole.attend(q[:, :, step]))[0])
        truth, names = ways[0][1], list(held)
        for name in names[begin % len(names) :] + names[: begin % len(names)]:
            store = held[name]
            written, _ = timed(lambda store=store, step=step: store.append(k[:, :, step], v[:, :, step]))
            seconds, part = timed(lambda store=store, step=step: store.attend(q[:, :, step], scale))
            ended, _ = timed(lambda store=store, step=step: store.end_step(q[:, :, step], scale))
            error = (part.out - truth).norm(dim=-1) / truth.norm(dim=-1)
            for column, value in zip(spent[name], (seconds, written + ended, error.mean().item()), strict=True):
                column.append(value)
    steps = {
        name: Steps(
            Timing(tuple(attend)),
            Timing(tuple(upkeep)),
            sum(errors) / len(errors),
            held[name].memory_bytes,
            min(budget, held[name].num_slots),
            plan.steps * (not held[name].is_whole),
        )
        for name, (attend, upkeep, errors) in spent.items()
    }
    return Timing(tuple(exact)), Timing(tuple(own)), steps


def measure(plan: Plan) -> list[dict[str, object]]:
    records = []
    for heads, kv_heads, width in plan.shapes:
        found, whole = [], 0
        for seed in range(plan.seeds):
            announce(f"{heads} heads on {kv_heads}, width {width}, seed {seed}")
            inputs = structured(plan.keys, heads=heads, kv_heads=kv_heads, head_dim=width, seed=seed)
            whole = 2 * inputs.k.numel() * inputs.k.element_size()
            with torch.inference_mode():
                found.append(run(inputs, plan))
        exact, own = (together(each[place] for each in found) for place in (0, 1))
        steps = {name: pooled([steps[name] for *_, steps in found]) for name in found[0][2]}
        shape = {"keys": plan.keys, "heads": heads, "kv_heads": kv_heads, "head_dim": width}
        shape |= {"steps": plan.steps, "seeds": plan.seeds}
        records += [describe(shape, name, exact, each, whole) for name, each in steps.items()]
        records += claims(shape, (exact, own), steps, whole, plan)
    return records


def together(timings: Iterable[Timing]) -> Timing:
    return Timing(tuple(second for timing in timings for second in timing.seconds))


def pooled(seeds: Sequence[Steps]) -> Steps:
    """Put the steps of all seeds together; memory and slots are those of the worst."""
    return Steps(
        together(each.attend for each in seeds),
        together(each.upkeep for each in seeds),
        sum(each.error for each in seeds) / len(seeds),
        max(each.memory_bytes for each in seeds),
        max(each.slots for each in seeds),
        sum(each.approximated for each in seeds),
    )


def describe(shape: dict, name: str, exact: Timing, each: Steps, whole: int) -> dict[str, object]:
    faster = speedup(exact, each.attend)
    return shape | {
        "part": "store", "store": name, "exact_seconds": exact.median, "exact_quartiles": exact.quartiles,
        "attend_seconds": each.attend.median, "attend_quartiles": each.attend.quartiles, "speedup": faster,
        "upkeep_seconds": mean(each.upkeep), "error": each.error, "memory_bytes": each.memory_bytes, "whole_bytes": whole,
        "slots": each.slots, "approximated": each.approximated, "share_of_keys": each.slots / shape["keys"],
    }  # fmt: skip


def mean(timing: Timing) -> float:
    # an average, not a median: one step in many pays for a compression
    return sum(timing.seconds) / len(timing.seconds)


def claims(
    shape: dict, timings: tuple[Timing, Timing], steps: dict[str, Steps], whole: int, plan: Plan
) -> Sequence[dict[str, object]]:
    (exact, own), (default, control, *_) = timings, steps.values()
    quickest = min(exact, own, key=lambda each: each.median)
    pages = steps["pages, nothing dropped"]
    if not all(each.approximated for each in steps.values()) or default.slots >= shape["keys"]:
        raise SystemExit("a store read every key: nothing was approximated, and there is nothing to claim")
    where = f"{shape['keys']:,} keys, {shape['heads']} heads on {shape['kv_heads']}, width {shape['head_dim']}"
    errors = f"error {default.error:.3f}; control {control.error:.3f}, {speedup(exact, control.attend).value:.1f}x"
    paged = f"pages, nothing dropped: error {pages.error:.3f}, {speedup(exact, pages.attend).value:.1f}x"
    fastest = f"{speedup(quickest, default.attend).value:.1f}x the quickest exact, {1e3 * quickest.median:.1f} ms"
    saved = exact.median - default.attend.median
    share = mean(default.upkeep) / saved
    memory = default.memory_bytes / whole
    return (
        dict(at_least(f"decoding step, {where}, a sixteenth held, vs exact SDPA", speedup(exact, default.attend).value, 6,
                      f"{errors}; {paged}; {fastest}; {1e3 * default.attend.median:.2f} ms of {1e3 * exact.median:.2f}"))
        | shape,
        figure(f"memory of that cache, {where}", "<= 1/12", memory, memory <= 1 / 12, f"1/{1 / memory:.1f}",
               f"{default.memory_bytes / 2**20:.1f} MiB of {whole / 2**20:.0f}; keys, values, weights, positions") | shape,
        figure(f"upkeep of that cache a token, {where}, of the time saved", "<= 20 %", 100 * share, 0 <= share <= 0.2,
               f"{100 * share:.3g} %", f"{1e3 * mean(default.upkeep):.2f} ms beside {1e3 * saved:.2f} ms saved; control "
               f"{1e3 * mean(control.upkeep):.2f} ms; mean over {plan.seeds} x {plan.steps} steps") | shape,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="file of the records")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="short inputs, to see that the script runs")
    args = parser.parse_args()
    if args.toy and args.out == OUT:
        parser.error("--toy measures nothing worth committing: name another file with --out")
    torch.set_num_threads(args.threads)
    records = measure(TOY if args.toy else Plan())
    write_records(args.out, records, kind="cache_decode")
    for record in records:
        if record["part"] == "figure":
            verdict = "met" if record["met"] else "MISSED"
            print(f"  {verdict}: {record['claim']}: {record['shown']} ({record['bar']}); {record['beside']}")
        else:
            print(f"  {record['store']}: {record['speedup'].value:.1f}x, error {record['error']:.3f}")


if __name__ == "__main__":
    main()
