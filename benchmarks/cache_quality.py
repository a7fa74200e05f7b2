"""What policies of a compressed cache lose on the reference model: loss of a continuation, and facts found by depth.

    python benchmarks/cache_quality.py       # an hour on one core; --policies a,b names some beside the baselines
    python benchmarks/cache_quality.py --parts /tmp/parts.pickle   # keeps what is measured, and goes on from there
    python benchmarks/cache_quality.py --toy --out /tmp/q.jsonl    # to see that the script runs; says nothing

Every policy that `hyperattention eval` knows, at the same budgets, shown the same prompts: a prompt is read once, with exact
attention, for all of them. Lines of kind "figure" are what is claimed, the others what it rests on. `hyperattention eval`
does the same for a user's own model.
"""

import argparse
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from claims import announce, figure
from rich.console import Console

from hyperattention.cache.policy import Policy
from hyperattention.evaluation.ask import AskSettings, ask
from hyperattention.evaluation.continuation import Texts, continuation_loss
from hyperattention.evaluation.families import choose_families
from hyperattention.evaluation.policies import candidates_at
from hyperattention.evaluation.run import dialect_of, haystack_of
from hyperattention.evaluation.summary import Cell, Continuation, cells, continuations
from hyperattention.evaluation.tasks import TASKS
from hyperattention.evaluation.tasks.setting import Setting
from hyperattention.files.records import plain, write_records
from hyperattention.files.user_text import Text
from hyperattention.reference.model import WEIGHTS, load_reference
from hyperattention.reference.text import held_out_text
from hyperattention.report.evaluation_files import cell_record, continuation_record
from hyperattention.report.evaluation_tables import continuation_table, retrieval_table

ROOT = Path(__file__).parents[1]
# the control has to lose something before anyone can lose less
ENOUGH = 0.02
CONTROL, STREAMING = "uniform", "streaming"


@dataclass(frozen=True)
class Plan:
    # length, then tasks with how many contexts a seed
    tasks: tuple[tuple[int, tuple[tuple[str, int], ...]], ...] = ((32_768, (("multi-key", 1),)),)
    budgets: tuple[int, ...] = (1024, 2048)
    depths: int = 8
    seeds: int = 2
    documents: int = 2
    continuation: int = 1024
    chunk: int = 32
    # questions of a context that are also asked while they are visible: each needs its own compression, too long a time here
    shown: int = 0
    # families whose continuation is not read: the sums over a whole prompt cost more than all other policies together
    unread: tuple[str, ...] = ("heavy_hitters",)


TOY = Plan(((1024, (("single", 1), ("multi-key", 1))),), (256,), 4, 1, 2, 256, shown=8, unread=())


@dataclass(frozen=True)
class Parts:
    """Finished parts of a measurement, in a file that is written after each; without a file nothing is kept."""

    path: Path | None

    def get(self, key: tuple[object, ...], measured: Callable[[], Iterable]) -> list:
        """Return what the file holds under a key, or measure it and write it there."""
        done = pickle.loads(self.path.read_bytes()) if self.path is not None and self.path.exists() else {}
        if repr(key) not in done:
            announce(" ".join(map(str, key[:3])))
            done[repr(key)] = list(measured())
            if self.path is not None:
                self.path.write_bytes(pickle.dumps(done))
        return done[repr(key)]


def measure(
    plan: Plan, policies: tuple[str, ...] | None, reference: Path, parts: Parts
) -> tuple[Sequence[Cell], Sequence[Continuation]]:
    loaded = load_reference(reference)
    haystack = haystack_of(loaded, Text(held_out_text(), "held-out text"))
    candidates = candidates_at(choose_families(policies), plan.budgets)
    replies, losses = [], []
    for length, tasks in plan.tasks:
        for seed in range(plan.seeds):
            # other seeds do not change what a seed measures
            where = length, f"seed {seed}", replace(plan, seeds=0), policies, reference
            visible = (False, True) if plan.shown else (False,)
            asking = AskSettings(loaded.model, dialect_of(loaded), candidates, visible, shown=plan.shown, seed=seed)
            read = replace(asking, candidates=tuple(each for each in candidates if each.family.name not in plan.unread))
            for task, contexts in tasks:
                setting = Setting(haystack, length, plan.depths, contexts, seed)
                replies += parts.get((task, *where), partial(ask, asking, TASKS[task](setting)))
            texts = Texts(length, plan.continuation, plan.documents, plan.chunk)
            found = parts.get(("continuation", *where), partial(continuation_loss, read, haystack.tokens, texts))
            losses += [(length, loss) for loss in found]
    return cells(replies, plan.depths), continuations(losses)


def loss_figures(found: Sequence[Continuation]) -> list:
    """The best policy that drops keys, no baseline, against the uniform control, wherever the control loses enough."""
    figures = []
    for length, budget in dict.fromkeys((each.length, each.candidate.budget) for each in found):
        own = {
            each.candidate.family.name: each for each in found if (each.length, each.candidate.budget) == (length, budget)
        }
        control, streaming = own[CONTROL].added, own[STREAMING].added
        ours = [
            each
            for each in own.values()
            if isinstance(each.candidate.family.policy, Policy) and not each.candidate.family.baseline
        ]
        if not ours or control.nats < ENOUGH:
            continue
        best = min(ours, key=lambda each: each.added.nats)
        ratio = best.added.nats / control.nats
        claim = f"loss added by the best dropping policy, of the uniform control's; {length:,} tokens, {budget} slots"
        beside = (
            f"{best.candidate.family.name} {best.added.nats:+.4f} ± {best.added.error or 0:.4f} nats a byte, control "
            f"{control.nats:+.4f} ± {control.error or 0:.4f}, streaming {streaming.nats:+.4f} ± {streaming.error or 0:.4f}; "
            f"best of {len(ours)} on the same {best.added.texts} texts"
        )
        figures.append(figure(claim, "<= 0.7x", ratio, ratio <= 0.7, f"{ratio:.2f}x", beside))
    return figures


def retrieval_figures(found: Sequence[Cell], plan: Plan) -> list:
    """The best way to keep everything and read a sixteenth, at its worst depth, against exact attention."""
    figures = []
    for length, task in dict.fromkeys((cell.length, cell.task) for cell in found):
        own = [cell for cell in found if (cell.length, cell.task, cell.visible) == (length, task, False) and not cell.beyond]
        whole = next((cell.memory_bytes for cell in own if cell.candidate.family.policy is None), None)
        behind: dict[str, float] = {}
        for cell in own:
            who = cell.candidate
            selects = who.family.policy is not None and whole is not None and cell.memory_bytes >= 0.9 * whole
            if selects and who.budget * 16 <= length and cell.depth is not None:
                behind[who.name] = max(behind.get(who.name, 0.0), cell.ceiling.value - cell.share.value)
        if not behind:
            continue
        best = min(behind, key=lambda name: behind[name])
        answers = min(cell.share.total for cell in own if cell.depth is not None)
        claim = f"answers lost by the best selection at its worst depth; {task}, {length:,} tokens, 1/16 of keys read"
        beside = (
            f"{best}; at least {answers} answers at each of {plan.depths} depths; best of {len(behind)} on the same items"
        )
        figures.append(figure(claim, "<= 3 points", behind[best], behind[best] <= 0.03, f"{behind[best]:.1%}", beside))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "records" / "cache_quality.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference", type=Path, default=WEIGHTS, help="folder of the reference model")
    parser.add_argument("--policies", help="names beside the baselines, with commas between; all by default")
    parser.add_argument("--seeds", type=int, help="fewer or more than 2")
    parser.add_argument("--parts", type=Path, help="a file of finished parts, to go on after an interruption")
    parser.add_argument("--toy", action="store_true", help="short inputs, to see that the script runs")
    args = parser.parse_args()
    if args.toy and args.out == parser.get_default("out"):
        parser.error("--toy measures nothing worth committing: name another file with --out")
    torch.set_num_threads(args.threads)
    plan, began, console = TOY if args.toy else Plan(), time.perf_counter(), Console(width=150)
    plan = plan if args.seeds is None else replace(plan, seeds=args.seeds)
    policies = None if args.policies is None else tuple(args.policies.split(","))
    found, losses = measure(plan, policies, args.reference, Parts(args.parts))
    for length, _ in plan.tasks:
        console.print(
            retrieval_table([cell for cell in found if cell.length == length], f"{length:,} tokens: answers found")
        )
        title = f"{length:,} tokens: loss of the last {plan.continuation}"
        console.print(continuation_table([each for each in losses if each.length == length], title))
    figures = [*loss_figures(losses), *retrieval_figures(found, plan)]
    shared = {"seeds": plan.seeds, "depths": plan.depths, "chunk": plan.chunk, "continuation": plan.continuation}
    measured = [
        *({"part": "retrieval"} | shared | cell_record(cell, plan.depths) for cell in found),
        *({"part": "continuation"} | shared | continuation_record(each) for each in losses),
    ]
    write_records(args.out, [*figures, *(plain(each) for each in measured)], kind="cache_quality")
    for each in figures:
        print(f"  {'met' if each['met'] else 'MISSED'}: {each['claim']}: {each['shown']} ({each['bar']}); {each['beside']}")
    print(f"{time.perf_counter() - began:.0f} s; wrote {args.out}")


if __name__ == "__main__":
    main()
