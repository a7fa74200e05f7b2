"""Train a small model of bytes with softmax and with polynomial attention, and time attention against the length.

    python benchmarks/poly_sketch.py train                     # 15 minutes on one thread; resumes
    python benchmarks/poly_sketch.py train --steps 4000 --batch 4        # hours: for a model that uses its whole context
    python benchmarks/poly_sketch.py time                      # 4 minutes on one thread
    python benchmarks/poly_sketch.py write                     # the table and the plot in docs/, from the records
    python benchmarks/poly_sketch.py train time --toy --out /tmp/toy.jsonl

Every kind of attention is trained for the same steps, on the same batches of the standard library's sources, with the
optimisers and rates of the reference model, which were chosen for softmax. The held-out text is that of files held out by
name. Times are what one thread computes for a whole attention layer, projections included, and one text; lengths and
layers run in turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from poly_sketch_model import CONTROL, Size, SoftmaxAttention, Texts, Trainer, attentions
from poly_sketch_table import RECORDS, plot, read, write_table
from torch import nn

from hyperattention.files.records import environment, plain
from hyperattention.nn import PolySketchAttention

Key = tuple[str, int]


@dataclass(frozen=True)
class Plan:
    size: Size = field(default_factory=Size)
    seeds: int = 3
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    rounds: int = 5
    # with gradients, which need memory for every token
    gradient_lengths: tuple[int, ...] = (2048, 4096, 8192)
    block: int = 256


TOY = Plan(Size(1, 32, 1, 32, 64, 2, 4, 2, 4, 16, 2, 2, 2), 2, (256, 512), 1, (256, 512), 32)


def share_of_pairs(length: int, block: int) -> float:
    """The share of all causal pairs whose weights are computed one by one: those within blocks."""
    whole, rest = divmod(length, block)
    return (whole * block * (block + 1) + rest * (rest + 1)) / (length * (length + 1))


def train(plan: Plan, out: Path, names: list[str]) -> None:
    texts, size = Texts.read(), plan.size
    done = [(each["attention"], each["seed"], each["size"]) for each in read(out) if each["part"] == "training"]
    for seed in range(plan.seeds):
        for name in names:
            if (name, seed, asdict(size)) in done:
                continue
            trainer, curve, losses, began = Trainer(size, name, seed), [], [], time.perf_counter()
            for step in range(size.steps):
                losses.append(trainer.advance(texts, step))
                if (step + 1) % size.every == 0:
                    last = step + 1 == size.steps
                    held_out = trainer.judge(texts, size.judged_last if last else size.judged)
                    curve.append((step + 1, sum(losses[-size.every :]) / size.every, held_out))
                    print(f"{name}, seed {seed}, step {step + 1}: {curve[-1][1]:.4f} trained, {held_out:.4f} held out, "
                          f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
            exact = name in ("softmax", "polynomial, exact")
            share = 1.0 if exact else share_of_pairs(size.length, size.block)
            assert exact or share < 1, f"{name} computes every pair at {size.length}"
            parameters = sum(p.numel() for p in trainer.model.parameters())
            note(out, {"part": "training", "attention": name, "seed": seed, "size": asdict(size), "curve": curve,
                       "losses": losses, "held_out": curve[-1][2], "share_of_pairs": share, "parameters": parameters,
                       "seconds": time.perf_counter() - began})  # fmt: skip


def layers(plan: Plan) -> dict[str, nn.Module]:
    width, heads = plan.size.width, plan.size.heads
    options = {"sketch_size": plan.size.sketch, "block": plan.block}
    return {
        "softmax": SoftmaxAttention(width, heads),
        "learned sketch": PolySketchAttention(width, heads, learned=True, **options),
        "random sketch": PolySketchAttention(width, heads, learned=False, **options),
    }


def forward(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            layer(x)

    return call


def with_gradients(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x).sum().backward()


def time_layers(plan: Plan, out: Path) -> None:
    torch.manual_seed(0)
    texts = {length: torch.randn(1, length, plan.size.width) for length in plan.lengths}
    for part, lengths, make in (
        ("forward", plan.lengths, forward), ("forward and backward", plan.gradient_lengths, with_gradients)
    ):  # fmt: skip
        calls = {(name, n): make(layer, texts[n]) for name, layer in layers(plan).items() for n in lengths}
        for name, n in calls:
            if n == min(lengths):
                calls[name, n]()  # not timed: the first call is slower
        # as many tokens for every length, so that quiet and busy phases of the machine meet all alike
        repeats = {(name, n): max(lengths) // n for name, n in calls}
        for (name, n), spent in in_turn(calls, repeats, plan.rounds).items():
            share = 1.0 if name == "softmax" else share_of_pairs(n, plan.block)
            assert name == "softmax" or share < 1, f"{name} computes every pair at {n}"
            computed = [each.computed for each in spent]
            note(out, {"part": part, "attention": name, "length": n, "computed_s": computed, "block": plan.block,
                       "seconds": [each.seconds for each in spent], "share_of_pairs": share,
                       "microseconds_a_token": 1e6 * statistics.median(computed) / n,
                       "width": plan.size.width, "heads": plan.size.heads, "sketch": plan.size.sketch})  # fmt: skip


@dataclass(frozen=True)
class Spent:
    """Seconds that passed, and seconds that the process computed: other work on the machine is in the first only."""

    seconds: float
    computed: float


def in_turn(calls: dict[Key, Callable[[], object]], repeats: dict[Key, int], rounds: int) -> dict[Key, list[Spent]]:
    """Time every call once a round, each round from another one on; of a call that is repeated, the mean."""
    keys, spent = list(calls), {key: [] for key in calls}
    for turn in range(rounds):
        start = turn * len(keys) // rounds
        for key in keys[start:] + keys[:start]:
            began, computed = time.perf_counter(), time.process_time()
            for _ in range(repeats[key]):
                calls[key]()
            ended = time.perf_counter(), time.process_time()
            spent[key].append(Spent((ended[0] - began) / repeats[key], (ended[1] - computed) / repeats[key]))
            print(f"    round {turn + 1}, {key[0]}, {key[1]:,}: {spent[key][-1].computed:.2f} s", flush=True)
    return spent


def note(out: Path, record: dict[str, object]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(plain({"kind": "poly_sketch"} | record | environment())) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("train", "time", "write"))
    names = ["softmax", "learned sketch", "random sketch", CONTROL]
    parser.add_argument("--attentions", nargs="+", default=names, choices=list(attentions(Size())))
    parser.add_argument("--steps", type=int, help="train longer; tables show the longest training that is recorded")
    parser.add_argument("--batch", type=int, help="texts in a step")
    parser.add_argument("--out", type=Path, default=RECORDS, help="file of the records")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="tiny models and texts, to see that the script runs")
    args = parser.parse_args()
    if args.toy and args.out == RECORDS:
        parser.error("--toy measures nothing worth committing: name another file with --out")
    torch.set_num_threads(args.threads)
    plan = TOY if args.toy else Plan()
    longer = {name: value for name, value in (("steps", args.steps), ("batch", args.batch)) if value}
    plan = replace(plan, size=replace(plan.size, **longer))
    if "train" in args.parts:
        train(plan, args.out, args.attentions)
    if "time" in args.parts:
        time_layers(plan, args.out)
    if "write" in args.parts:
        write_table(args.out)
        plot(args.out)


if __name__ == "__main__":
    main()
