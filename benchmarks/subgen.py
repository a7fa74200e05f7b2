"""How the memory of SubGen grows with a text, and what its error is beside a uniform sample of the same bytes.

    python benchmarks/subgen.py                             # two minutes on two cores
    python benchmarks/subgen.py --toy --out /tmp/s.jsonl    # to see that the script runs; says nothing

Two kinds of keys. *Clusterable* ones lie in balls whose diameter is SubGen's radius delta, as its theorem assumes, and the
balls are visited by Zipf's law; *structured* ones have the statistics of real models and lie in no balls. The published
estimator (`SubGen`) goes first; the practical variant (`ClusterCentres`) and the control (`UniformSample`) then get as many
bytes as it takes in the end, window and all. Texts of all lengths are decoded in turn, token by token, so that times can be
compared. Lines of kind "figure" are what is claimed, the others what it rests on.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from claims import announce, at_most, figure
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.store import Store
from hyperattention.files.records import write_records
from hyperattention.policies.cluster_centres import ClusterCentres
from hyperattention.policies.subgen import SubGen
from hyperattention.policies.subgen_store import SubGenStore
from hyperattention.policies.uniform_sample import UniformSample
from hyperattention.synthetic import structured

OUT = Path(__file__).parent / "records" / "subgen.jsonl"
FAITHFUL, PRACTICE, CONTROL = "SubGen, as published", "SubGen in practice", "uniform sample (control)"
# pairs drawn for the numerator: as `SubGen` has it, and enough to see that its error follows their root
DRAWS, MORE_DRAWS = 64, 1024
FAITHFUL_MORE = f"SubGen, as published, {MORE_DRAWS:,} values"
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Keys:
    """One kind of keys: the radius of SubGen's clusters, the lengths of the texts, and how these are made."""

    name: str
    delta: float
    lengths: tuple[int, ...]
    make: Callable[["Plan", int, int], QKV]


@dataclass(frozen=True)
class Plan:
    seeds: int = 3
    steps: int = 128
    heads: int = 4
    width: int = 64
    balls: int = 60
    ball_diameter: float = 8.0
    window: int = 64
    # tokens of the texts of either kind; the last are 16 times the first
    clusterable: tuple[int, ...] = (2048, 8192, 32768)
    structured: tuple[int, ...] = (512, 2048, 8192)

    @property
    def kinds(self) -> tuple[Keys, ...]:
        # half of all pairs of structured keys are within 14 of one another, so that 12 flatters SubGen
        return (
            Keys("clusterable", self.ball_diameter, self.clusterable, in_balls),
            Keys("structured", 12.0, self.structured, like_models),
        )


TOY = Plan(1, 40, 2, 16, 12, 4.0, 16, (256, 512, 4096), (256, 512, 4096))


@dataclass
class Course:
    """One store on its way through the last tokens of a text."""

    store: Store
    text: QKV
    upkeep: list[float] = field(default_factory=list)
    attend: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def in_balls(plan: Plan, num: int, seed: int) -> QKV:
    """Keys in balls around far centres, values around a mean of each ball."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(plan.heads, rows, plan.width, generator=generator)

    chance = 1 / torch.arange(1.0, plan.balls + 1)
    ball = torch.multinomial(chance, num, replacement=True, generator=generator)
    reach = torch.rand(plan.heads, num, 1, generator=generator) * plan.ball_diameter / 2
    k = (2 * normal(plan.balls))[:, ball] + normalize(normal(num), dim=-1) * reach
    v = normal(plan.balls)[:, ball] + normal(num) / 2
    return normal(num)[None], k[None], v[None]


def like_models(plan: Plan, num: int, seed: int) -> QKV:
    made = structured(num, heads=plan.heads, kv_heads=plan.heads, head_dim=plan.width, seed=seed)
    return made.q, made.k, made.v


def courses(plan: Plan, keys: Keys, num: int, seed: int) -> dict[str, Course]:
    """Let everyone read all but the last tokens of a text, each within the bytes that SubGen takes for all of it."""
    q, k, v = keys.make(plan, num, seed)

    def read(store: Store, end: int) -> Store:
        store.append(k[:, :, :end], v[:, :, :end])
        store.end_step(q[:, :, :end], plan.width**-0.5)
        return store

    def subgen(draws: int) -> Store:
        # as many clusters as it wants
        policy = SubGen(keys.delta, value_samples=draws, most_clusters=num)
        return policy.store(CacheBudget(4 * plan.window, 0, plan.window), 0, seed, None)

    # a slot is a key, a value, a weight, a position and a score; there is room for one more than the budget
    slots = read(subgen(DRAWS), num).memory_bytes // (plan.heads * (2 * plan.width + 3) * k.element_size()) - 1
    room = CacheBudget(slots, 4, plan.window)
    stores = {
        FAITHFUL: subgen(DRAWS),
        FAITHFUL_MORE: subgen(MORE_DRAWS),
        PRACTICE: CompressingStore(ClusterCentres(), room, seed=seed),
        CONTROL: CompressingStore(UniformSample(), room, seed=seed),
    }
    return {name: Course(read(store, num - plan.steps), (q, k, v)) for name, store in stores.items()}


def step(course: Course, at: int, scale: float) -> None:
    q, k, v = course.text
    place = slice(at, at + 1)
    began = time.perf_counter()
    course.store.append(k[:, :, place], v[:, :, place])
    written = time.perf_counter()
    out = course.store.attend(q[:, :, place], scale).out
    attended = time.perf_counter()
    course.store.end_step(q[:, :, place], scale)
    ended = time.perf_counter()
    course.upkeep.append(written - began + ended - attended)
    course.attend.append(attended - written)
    truth = scaled_dot_product_attention(q[:, :, place], k[:, :, : at + 1], v[:, :, : at + 1], scale=scale)
    course.errors.append(((out - truth).norm(dim=-1) / truth.norm(dim=-1)).mean().item())


def run(plan: Plan, keys: Keys, seed: int) -> list[dict[str, object]]:
    """Decode the last tokens of texts of all lengths, every step by everyone in turn."""
    running = {(num, name): course for num in keys.lengths for name, course in courses(plan, keys, num, seed).items()}
    order = list(running)
    for turn in range(plan.steps):
        first = turn % len(order)
        for num, name in order[first:] + order[:first]:
            step(running[num, name], num - plan.steps + turn, plan.width**-0.5)
    return [describe(plan, keys, (num, seed), name, course) for (num, name), course in running.items()]


def describe(plan: Plan, keys: Keys, text: tuple[int, int], name: str, course: Course) -> dict[str, object]:
    (num, seed), store = text, course.store
    if store.is_whole:
        raise SystemExit(f"{name} held every key of {num:,}: nothing was approximated, and there is nothing to compare")
    sketch = store.sketch if isinstance(store, SubGenStore) else None
    return {
        "part": "store", "store": name, "keys_are": keys.name, "keys": num, "seed": seed, "steps": plan.steps,
        "heads": plan.heads, "head_dim": plan.width, "delta": keys.delta, "window": plan.window,
        "memory_bytes": store.memory_bytes, "whole_bytes": 2 * course.text[1].numel() * course.text[1].element_size(),
        "sketch_bytes": None if sketch is None else sketch.memory_bytes,
        "clusters": None if sketch is None else sketch.num_clusters.double().mean().item(),
        # an average: one token in many pays for those that waited
        "upkeep_seconds": statistics.mean(course.upkeep), "attend_seconds": statistics.median(course.attend),
        "error": statistics.mean(course.errors), "approximated": plan.steps,
    }  # fmt: skip


def find(records: Sequence[Mapping], keys: Keys, num: int, name: str, what: str) -> list:
    """One number a seed."""
    return [x[what] for x in records if (x["keys_are"], x["keys"], x["store"]) == (keys.name, num, name)]


def spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def claims(plan: Plan, keys: Keys, records: Sequence[Mapping]) -> dict[str, object]:
    """Say by how much the sketch grew at the worst seed, and all that stands beside it."""
    few, most = keys.lengths[0], keys.lengths[-1]

    def of(num: int, what: str, name: str = FAITHFUL) -> list:
        return find(records, keys, num, name, what)

    growth = max(b / a for a, b in zip(of(few, "sketch_bytes"), of(most, "sketch_bytes"), strict=True))
    clusters = [statistics.mean(of(num, "clusters")) for num in (few, most)]
    held = statistics.mean(of(most, "memory_bytes"))
    share, more = held / of(most, "whole_bytes")[0], statistics.mean(of(most, "memory_bytes", FAITHFUL_MORE)) / held
    upkeep = [
        statistics.mean(of(*each))
        for each in ((few, "upkeep_seconds"), (most, "upkeep_seconds"), (most, "upkeep_seconds", CONTROL))
    ]
    claim = f"memory of SubGen as published, {keys.name} keys, {few:,} to {most:,}"
    beside = (
        f"worst of {plan.seeds} seeds; {clusters[0]:.0f} and {clusters[1]:.0f} clusters a head; at {most:,} keys with its "
        f"window {share:.1%} of all bytes; error there {spread(of(most, 'error'))}, in practice "
        f"{spread(of(most, 'error', PRACTICE))}, control {spread(of(most, 'error', CONTROL))}, at the same bytes; with "
        f"{MORE_DRAWS:,} draws of values for {DRAWS} {spread(of(most, 'error', FAITHFUL_MORE))}, at {more:.1f}x the bytes; "
        f"upkeep a token {upkeep[1] / upkeep[0]:.2f}x that at {few:,}, {upkeep[1] / upkeep[2]:.1f}x the control's"
    )
    if keys.name == "clusterable":
        return dict(at_most(claim, growth, 1.5, beside))
    return dict(figure(claim, "none: it grows", growth, True, f"{growth:.3g}x", beside))


def measure(plan: Plan) -> list[dict[str, object]]:
    records, figures = [], []
    for keys in plan.kinds:
        own = []
        for seed in range(plan.seeds):
            announce(f"{keys.name} keys, seed {seed}")
            with torch.inference_mode():
                own += run(plan, keys, seed)
        figures.append(claims(plan, keys, own))
        records += own
    return [*figures, *records]


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
    write_records(args.out, records, kind="subgen")
    for record in records:
        if record["part"] == "figure":
            verdict = "met" if record["met"] else "MISSED"
            print(f"  {verdict}: {record['claim']}: {record['shown']} ({record['bar']}); {record['beside']}")


if __name__ == "__main__":
    main()
