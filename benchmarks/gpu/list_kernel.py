"""Compare the two forms of the list kernel on a GPU: right first, then fast; one JSON line a case.

    python benchmarks/gpu/list_kernel.py                              # within two minutes on an H100
    python benchmarks/gpu/list_kernel.py --toy --out /tmp/toy.jsonl   # tiny, in the interpreter, to see that it runs

On the default method's lists, and on drawn ones of known length. Rows of both forms are compared with float64 before
anything is timed: where a kernel is wrong, nothing is written down. Times are taken in turn. One whole call is profiled.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

STARTED = time.monotonic()
if "--toy" in sys.argv:
    # kernels read this when they are defined
    os.environ["TRITON_INTERPRET"] = "1"

# the folder is a package; `gpu.run` finds ours, and stands in for jaxtyping where it is missing
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import hyperattention as ha  # noqa: E402
from gpu import run  # noqa: E402, F401
from gpu.session import TOY, Clock, Journal, Plan, describe_run, reason_of  # noqa: E402
from gpu.tasks import make_tensors  # noqa: E402
from gpu.timing import calls_in_sample, interleave, seconds_of  # noqa: E402
from hyperattention.kernels.launch import store_of  # noqa: E402
from hyperattention.kernels.list import reference, triton_flat, triton_flatten, triton_forward  # noqa: E402
from hyperattention.kernels.list.flat_form import FlatForm, flat_form_of  # noqa: E402
from hyperattention.kernels.list.operator import fields  # noqa: E402
from hyperattention.kernels.list.reference import Lists  # noqa: E402
from hyperattention.problem import Problem  # noqa: E402
from hyperattention.types import Runs, Selection  # noqa: E402

WINDOW, DRAWN = 256, 704
CHECKED_TILES, SHOWN_KERNELS = 6, 25
# shapes beside the one that is chosen: rows, slots, warps, stages, and whether log-weights are fetched a block ahead
SWEEP = (
    ((128, 64, 4, 2), True), ((128, 64, 4, 2), False), ((256, 64, 8, 2), False), ((256, 64, 8, 2), True),
    ((256, 64, 16, 3), False), ((128, 64, 8, 3), True), ((128, 32, 4, 4), True),
)  # fmt: skip
# by which lse may differ from float64: one key of a thousand changes it by more
LSE_ERROR = 1e-5


@dataclass(frozen=True)
class Case:
    """Lists, and the tensors that they are lists for."""

    name: str
    keys: int
    q: Tensor
    k: Tensor
    v: Tensor
    lists: Lists
    form: FlatForm
    scale: float

    def old(self) -> tuple[Tensor, Tensor]:
        return triton_forward.forward(self.q, self.k, self.v, self.lists, self.scale)

    def new(self) -> tuple[Tensor, Tensor]:
        return triton_flat.flat_forward(self.q, self.k, self.v, self.form, self.scale)


def case_of(name: str, problem: Problem, q: Tensor, selection: Selection) -> Case:
    lists, (k, v) = Lists(*fields(selection)), (x.flatten(0, 1) for x in (problem.k, problem.v))
    form = flat_form_of(lists, k.shape[1], paged=False)
    assert form is not None, f"{name}: the fast kernel does not read these lists"
    return Case(name, k.shape[1], q, k, v, lists, form, problem.scale)


def method_cases(name: str, method: ha.Method, problem: Problem) -> Iterator[Case]:
    """The lists of a method: where rows are sorted, those of positions first."""
    with torch.no_grad():
        for tiling, selection in method.selections(problem):
            yield case_of(name, problem, tiling.split(problem.q), selection)
            name = f"{name}, sorted"


def drawn_case(plan: Plan, problem: Problem, size: int) -> Case:
    """A window, the own tile, and keys drawn evenly from those before the window, as weights of a sample have them."""
    window, drawn = (32, 28) if plan.toy else (WINDOW, DRAWN)
    device, (batch, heads, tokens, width) = problem.q.device, problem.q.shape
    lists, group, tiles = batch * problem.k.shape[1], heads // problem.k.shape[1], tokens // size
    start = (torch.arange(tiles, device=device) * size).expand(lists, -1).contiguous()
    before = (start - window).clamp(min=0)[..., None]
    draws = torch.Generator(device).manual_seed(plan.seed)
    index = (torch.rand((lists, tiles, drawn), generator=draws, device=device) * before).long()
    weight = (before / drawn).clamp(min=1).log().float().masked_fill(before == 0, -torch.inf).expand(index.shape)
    none = torch.zeros(lists, tiles, 1, device=device)
    low = torch.zeros_like(start)
    runs = (
        Runs(start[..., None] - window, window, none, low, start),
        Runs(start[..., None], size, none, low, start + size, causal=True),
        Runs(index, 1, weight.contiguous(), low, start),
    )
    limit = (torch.arange(tokens, device=device) + 1).view(tiles, size).repeat(1, group).expand(lists, -1, -1)
    q = problem.q.reshape(lists, group, tiles, size, width).transpose(1, 2)
    key_row = torch.arange(lists, device=device)
    return case_of(f"drawn, tiles of {size}", problem, q, Selection(runs, row_limit=limit.contiguous(), key_row=key_row))


def cases(plan: Plan, tokens: int) -> Iterator[Case]:
    q, k, v = make_tensors(plan, "structured", tokens).qkv
    problem = Problem(q, k, v, plan.head_dim**-0.5, causal=True, seed=plan.seed)
    yield from method_cases("lean", plan.lean, problem)
    yield from method_cases("default", plan.method, problem)
    for size in (64, 16):
        yield drawn_case(plan, problem, size)


def some_tiles(lists: Lists, at: Tensor) -> Lists:
    def picked(x: Tensor) -> Tensor:
        return x[:, at]

    holes = [hole[:, :, at] if hole.numel() else hole for hole in lists.hole]
    return replace(
        lists, row_limit=picked(lists.row_limit), first=list(map(picked, lists.first)), hole=holes,
        log_weight=list(map(picked, lists.log_weight)), low=list(map(picked, lists.low)), high=list(map(picked, lists.high)),
    )  # fmt: skip


def allowed_for(dtype: torch.dtype) -> float:
    """By how much a row may differ, relative to the largest number: a rounding step, in float32 one of each of many sums."""
    return max(torch.finfo(dtype).eps, 32 * torch.finfo(torch.float32).eps)


def check(case: Case) -> dict[str, float]:
    """Compare rows of both forms with float64, relative to the largest number; raise where the new form is wrong."""
    tiles = case.q.shape[1]
    at = torch.linspace(0, tiles - 1, min(tiles, CHECKED_TILES)).round().long().to(case.q.device)
    wide = (x.double() for x in (case.q[:, at].flatten(2, 3), case.k, case.v))
    out, lse = reference.forward(*wide, some_tiles(case.lists, at), case.scale)
    found = {}
    for name, results in (("old", case.old()), ("new", case.new())):
        ours, logs = (x[:, at].flatten(2, 3).double() for x in results)
        found[name] = ((ours - out).abs().max() / out.abs().max()).item()
        # rows without keys: -inf in both
        off = (logs - lse).masked_fill(logs == lse, 0.0).abs().max()
        found[f"{name} lse"] = (off / lse.masked_fill(lse == -torch.inf, 0.0).abs().max()).item()
    allowed = allowed_for(case.q.dtype)
    print(f"  {case.keys} {case.name}: error {found}, allowed {allowed:.3g} and {LSE_ERROR:.3g} of lse", flush=True)
    # not a number must not pass
    if not (found["new"] <= allowed and found["new lse"] <= LSE_ERROR):
        raise SystemExit(f"{case.name} at {case.keys} keys: the new kernel is wrong; nothing is written down")
    return found


def launch_of(case: Case, cut: triton_forward.Shape, carry: bool):
    num_lists, tiles, group, size = case.q.shape[:4]
    lse = torch.empty(num_lists, group, tiles, size, device=case.q.device)
    out = torch.empty(*lse.shape, case.v.shape[-1], device=case.q.device, dtype=case.q.dtype)
    flat = triton_flatten.flatten(case.form)
    stores = store_of(case.k, None), store_of(case.v, None)
    launch = triton_flat.launch_flat(case.q, *stores, (out, lse), case.form, flat, case.scale, cut, carry=carry)
    pairs = int(flat.header[:, [3, 6]].sum()) * group * size
    return launch, 2 * pairs * (case.q.shape[-1] + case.v.shape[-1])


def cut_of(case: Case) -> triton_forward.Shape:
    rows, width = case.q.shape[2] * case.q.shape[3], triton_forward.widest(case.q, case.v)
    return triton_flat.flat_shape_of(rows, width, case.q.element_size(), triton_forward.capability_of(case.q))


def timed(plan: Plan, calls: dict) -> dict[str, float]:
    """Time calls in turn; milliseconds of each, the median of all rounds."""
    device = torch.device(plan.device)
    samples = {}
    for name, call in calls.items():
        if plan.toy:
            samples[name] = (call, 1)
            continue
        call()
        samples[name] = (call, calls_in_sample(seconds_of(call, device), device))
    return {name: 1000 * each.median for name, each in interleave(samples, plan.rounds, device).items()}


def measure(plan: Plan, journal: Journal, case: Case) -> None:
    errors, cut = check(case), cut_of(case)
    launch, flop = launch_of(case, cut, triton_flat.carries(cut))
    calls = {
        "old": case.old, "new": case.new, "flatten": lambda: triton_flatten.flatten(case.form), "new, flattened": launch.run,
    }  # fmt: skip
    spent = timed(plan, calls)
    rates = {name: flop / ms / 1e9 for name, ms in spent.items() if name != "flatten"}
    shown = "; ".join(
        f"{name} {ms:.3g} ms" + (f" {rates[name]:.0f} TFLOP/s" if name in rates else "") for name, ms in spent.items()
    )
    journal.write({
        "part": "list", "case": case.name, "keys": case.keys, "cut": cut, "ms": spent, "tflop_per_s": rates,
        "errors": errors,
        "shown": f"{case.keys} {case.name}: {shown}",
    })  # fmt: skip


def sweep(plan: Plan, journal: Journal, case: Case, clock: Clock) -> None:
    """Time other shapes of a program, while there is time to compile them."""
    right, _ = triton_flat.flat_forward(case.q, case.k, case.v, case.form, case.scale)
    for numbers, carry in SWEEP[: 1 if plan.toy else None]:
        if clock.left < 15 and not plan.toy:
            return
        try:
            launch, flop = launch_of(case, triton_forward.Shape(*numbers), carry)
            (ms,) = timed(plan, {"sweep": launch.run}).values()
        except Exception as error:
            journal.write({"part": "sweep", "cut": numbers, "carry": carry, "failed": reason_of(error)})
            continue
        out = launch.arguments["out_ptr"].transpose(1, 2)
        error = ((out - right).abs().max() / right.abs().max()).item()
        if not error <= allowed_for(out.dtype):
            raise SystemExit(f"shape {numbers} gives other rows: error {error}")
        rate = flop / ms / 1e9
        shown = f"{case.keys} {case.name}, {numbers}{' carried' if carry else ''}: {ms:.3g} ms {rate:.0f} TFLOP/s"
        journal.write({
            "part": "sweep", "case": case.name, "keys": case.keys, "cut": numbers, "carry": carry, "ms": ms,
            "tflop_per_s": rate, "error": error, "shown": shown,
        })  # fmt: skip


def profile(plan: Plan, journal: Journal) -> None:
    """One call of the method, by the names of its kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    q, k, v = make_tensors(plan, "structured", plan.long).qkv
    on_gpu = plan.device == "cuda"

    def call() -> None:
        ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=plan.method)
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    with watch(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        call()
    events = [x for x in seen.key_averages() if not on_gpu or "CUDA" in str(x.device_type)]
    rows = [
        {
            "kernel": x.key[:100],
            "calls": x.count,
            "ms": (x.self_device_time_total if on_gpu else x.self_cpu_time_total) / 1000,
        }
        for x in events
    ]
    rows.sort(key=lambda row: -row["ms"])
    total, launches = sum(row["ms"] for row in rows), sum(row["calls"] for row in rows)
    for row in rows[:SHOWN_KERNELS]:
        print(f"    {row['ms']:8.3f} ms {row['calls']:5d} x {row['kernel']}")
    journal.write({
        "part": "profile", "keys": plan.long, "method": repr(plan.method), "total_ms": total, "launches": launches,
        "kernels": rows[:SHOWN_KERNELS], "shown": f"{total:.3g} ms in {launches} launches",
    })  # fmt: skip


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "records" / "gpu_list.jsonl", help="records"
    )
    parser.add_argument("--seconds", type=float, default=115, help="time for all; shapes that do not fit are left out")
    parser.add_argument("--commit", help="commit to record, where there is no git checkout to ask")
    parser.add_argument("--toy", action="store_true", help="tiny inputs in the interpreter, on a CPU")
    args = parser.parse_args(words)
    if args.toy and args.out == parser.get_default("out"):
        parser.error("--toy measures nothing worth committing: name another file with --out")
    if not args.toy and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: pass --toy to run tiny inputs on the CPU, which measures nothing")
    return args


def main() -> None:
    args = parse()
    plan = replace(TOY, long=128, heads=2, kv_heads=1, head_dim=16) if args.toy else Plan()
    lengths = (128,) if args.toy else (8192, plan.long, 32768)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.unlink(missing_ok=True)
    journal, clock = Journal(args.out, describe_run(plan, args.commit)), Clock(STARTED + args.seconds)
    for tokens in lengths[:2]:
        for case in cases(plan, tokens):
            check(case)
    for tokens in lengths:
        for case in cases(plan, tokens):
            measure(plan, journal, case)
    profile(plan, journal)
    sweep(plan, journal, next(iter(cases(plan, plan.long))), clock)
    print(f"{time.monotonic() - STARTED:.0f} s", flush=True)


if __name__ == "__main__":
    main()
