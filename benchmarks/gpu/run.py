"""Measure attention on a GPU beside torch's exact kernels, and write each measurement down as a JSON line at once.

    python benchmarks/gpu/run.py --quick --out FILE                # are kernels right, lengths, launches: four minutes
    python benchmarks/gpu/run.py                                   # all parts, within ten minutes
    python benchmarks/gpu/run.py --only forward --only backward    # some parts
    python benchmarks/gpu/run.py --peer DIR                        # published HyperAttention's own code from a checkout
    python benchmarks/gpu/run.py --toy --out /tmp/toy.jsonl        # tiny, on a CPU, to see that it runs; says nothing

Every comparison is of one run: times in turn, the error of every candidate against exact rows beside them, on structured
and Gaussian inputs. The records are committed, and benchmarks/report.py writes tables and plots from them. Needs torch and
the package alone; the package is found in this checkout where it is not installed. --quick needs pytest as well: it writes
nothing if a kernel's test fails, and says at the end what has changed since the committed records.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "records" / "gpu.jsonl"
# of --quick, for the tests of kernels
_TEST_SECONDS = 200.0


def _stand_in_for_jaxtyping() -> None:
    """Let annotations mean their array type alone on a bare machine: they are checked in the tests, never in a run."""

    class Annotation:
        def __class_getitem__(cls, item):
            return item[0]

    def find(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Annotation

    module = ModuleType("jaxtyping")
    vars(module)["__getattr__"] = find
    sys.modules["jaxtyping"] = module


# a script finds what lies beside it, and this one is a part of the folder
sys.path.insert(0, str(ROOT / "benchmarks"))
if find_spec("hyperattention") is None:
    sys.path.insert(0, str(ROOT / "src"))
if find_spec("jaxtyping") is None:
    _stand_in_for_jaxtyping()

import torch  # noqa: E402 - the package must be found first

import hyperattention  # noqa: E402
from gpu import parts, quick  # noqa: E402
from gpu.roofline import measure_ceilings  # noqa: E402
from gpu.session import TOY, Clock, Journal, OutOfTime, Plan, Session, describe_run, forget, limit, reason_of  # noqa: E402
from gpu.stack import stack  # noqa: E402
from gpu.table import plain_table  # noqa: E402


@dataclass(frozen=True)
class Part:
    """A part, the seconds it may take, and those without which it is not begun."""

    measure: Callable[[Session], None]
    allowance: float
    least: float = 5.0

    @property
    def name(self) -> str:
        return self.measure.__name__


# in the order of what is missed most if time runs out
PARTS = (
    Part(parts.forward, 120),
    Part(parts.backward, 60, 15),
    Part(parts.crossover, 80),
    Part(parts.selection, 20),
    Part(parts.audit, 20),
    Part(parts.peer, 60, 10),
    Part(parts.long, 110, 30),
    Part(parts.decode, 40),
    Part(stack, 90, 30),
    Part(parts.flex, 60, 15),
)
# what --quick measures, beside the tests of kernels
QUICK = (Part(quick.lengths, 90), Part(quick.launches, 40))
# kept back for the table
_LAST_SECONDS = 5.0


def run_part(part: Part, session: Session) -> None:
    print(part.name, flush=True)
    left = session.clock.left - _LAST_SECONDS
    least = 0.0 if session.plan.toy else part.least
    if left <= least:
        why = f"out of time: {max(left, 0):.0f} s left, {part.name} needs {part.least:.0f}"
        session.journal.write({"part": part.name, "skipped": why})
        return
    allowed = min(left, part.allowance)
    try:
        with limit(allowed):
            part.measure(replace(session, clock=session.clock.within(allowed)))
    except OutOfTime:
        session.journal.write({"part": part.name, "skipped": f"out of time: cut off after {allowed:.0f} s"})
    except Exception as error:
        traceback.print_exc()
        session.journal.write({"part": part.name, "failed": reason_of(error)})
    forget()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in (*PARTS, *QUICK)]
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", action="append", choices=names, help="measure this part; may be given again")
    which.add_argument("--quick", action="store_true", help="test the kernels, then measure lengths and launches")
    parser.add_argument("--peer", type=Path, help="checkout of published HyperAttention (insuhan/hyper-attn) to measure")
    parser.add_argument("--out", type=Path, default=RECORDS, help="file of the records, replaced unless --append")
    parser.add_argument("--append", action="store_true", help="add to the records, where parts are measured one by one")
    parser.add_argument(
        "--seconds", type=float, default=540, help="time for all; parts that do not fit are skipped and say so"
    )
    parser.add_argument("--method", help='method to judge in place of the default, as code: "Method(Sinks(16), ...)"')
    parser.add_argument("--commit", help="commit to record, where there is no git checkout to ask")
    parser.add_argument("--toy", action="store_true", help="tiny inputs on a CPU, to see that the script runs")
    args = parser.parse_args(words)
    if args.toy and args.out == RECORDS:
        parser.error("--toy measures nothing worth committing: name another file with --out")
    if not args.toy and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: pass --toy to run tiny inputs on the CPU, which measures nothing")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    plan = TOY if args.toy else Plan()
    if args.method:
        # whoever types a command line may run code anyway
        plan = replace(plan, method=eval(args.method, dict(vars(hyperattention))))
    return plan


def device_works(plan: Plan) -> bool:
    """Return whether the device still answers: after an illegal access no call in this process does."""
    if plan.device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def rest_of(args: argparse.Namespace, wanted: Sequence[Part], left: float) -> list[str]:
    """Write the command line that measures what is left in the time that is left."""
    options = {"--peer": args.peer, "--out": args.out, "--method": args.method, "--commit": args.commit}
    given = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    only = [word for part in wanted for word in ("--only", part.name)]
    return [*given, *only, "--append", "--seconds", f"{left:.0f}", *(["--toy"] if args.toy else [])]


def main() -> None:
    args = parse()
    plan = plan_of(args)
    before = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    if args.quick and not args.toy and (why := quick.why_wrong(quick.KERNEL_TESTS, _TEST_SECONDS)):
        sys.exit(f"nothing is measured or recorded: {why}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.append:
        args.out.write_text("")
    earlier = [json.loads(line) for line in args.out.read_text().splitlines()] if args.append and args.out.exists() else []
    journal = Journal(args.out, describe_run(plan, args.commit), earlier)
    session = Session(plan, Clock(STARTED + args.seconds), journal, peer=args.peer)
    ceilings, record = measure_ceilings(session)
    journal.write(record)
    session = replace(session, ceilings=ceilings)
    wanted = [part for part in (*PARTS, *QUICK) if part.name in args.only] if args.only else QUICK if args.quick else PARTS
    for place, part in enumerate(wanted, 1):
        run_part(part, session)
        if wanted[place:] and not device_works(plan):
            print("the device reports an error that stays: the other parts run in a fresh process", flush=True)
            os.execv(sys.executable, [sys.executable, __file__, *rest_of(args, wanted[place:], session.clock.left)])
    lines = quick.against(journal.records, before) if args.quick else [plain_table(journal.records)]
    print("\n" + "\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
