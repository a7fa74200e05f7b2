"""A look at a card in four minutes: whether kernels are right, what calls take, where time goes, and what has changed."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.bars import Records, candidate, error_text
from gpu.candidates import Candidate, candidate_of, exact_candidates, our_candidates, time_exact
from gpu.compare import compare, scene_of
from gpu.session import Record, Session
from gpu.tasks import Task, make_tensors

TESTS = Path(__file__).resolve().parents[2] / "tests"
# the tests of compiled kernels: each of the others runs without a card as well
KERNEL_TESTS = (TESTS / "test_gpu_alike.py", TESTS / "test_gpu.py", TESTS / "test_gpu_feature.py")
# processes that test beside one another, and kernels that a record names
_WORKERS, _NAMED = 5, 30
# the parts whose lengths an earlier record may have measured
_PARTS = ("lengths", "forward", "crossover")


def why_wrong(tests: Sequence[Path], seconds: float) -> str | None:
    """Run tests of kernels; say why nothing may be recorded, or None where all is well.

    Args:
        tests: files of tests, of which those marked `gpu` run.
        seconds: time for all of them.

    Returns:
        the end of what pytest printed if a test failed, or that none ran: a run that tested nothing shows nothing.
    """
    with TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *map(str, tests)]
        words += ["-n", str(_WORKERS)] if find_spec("xdist") else []
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"the tests of kernels did not end within {seconds:.0f} s"
        if done.returncode or not report.exists():
            return f"a kernel is wrong, or its test did not run:\n{(done.stdout + done.stderr)[-4000:]}"
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        counts = [(int(suite.attrib["tests"]), int(suite.attrib["skipped"])) for suite in suites]
    passed = sum(tests - skipped for tests, skipped in counts)
    print(f"{passed} tests of kernels passed, {sum(skipped for _, skipped in counts)} were skipped", flush=True)
    return None if passed else "no test of a kernel ran: all were skipped"


def lengths(session: Session) -> None:
    """Causal forward passes: the default, its control and the lean method beside exact attention, at several lengths.

    Only structured inputs, and only the exact kernel that is fastest here.
    """
    plan = session.plan
    fastest = next(iter(time_exact(session)))
    for length in sorted({plan.long, *plan.shorter, plan.probe}):
        task = Task(make_tensors(plan, "structured", length))
        lean = candidate_of(session, task, "lean", "hyperattention, lean", plan.lean)
        entries = [*exact_candidates(task, [fastest]), *our_candidates(session, task), lean]
        session.journal.write(compare(session, "lengths", scene_of(session, task), entries))


def launches(session: Session) -> None:
    """The kernels of one call, by the time that they take."""
    plan = session.plan
    for length in sorted({plan.shorter[-1], plan.long}):
        task = Task(make_tensors(plan, "structured", length))
        for name, method in (("ours", plan.method), ("lean", plan.lean)):
            session.journal.write(_profile(session, task, candidate_of(session, task, name, name, method)))


def _profile(session: Session, task: Task, one: Candidate) -> Record:
    """Profile one call of a candidate, after one that compiles."""
    on_cuda = session.device.type == "cuda"
    one.call()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as found:
        one.call()
        if on_cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [event for event in found.key_averages() if event.device_type == wanted]
    spent = {e.key: (e.count, (e.self_device_time_total if on_cuda else e.self_cpu_time_total) / 1e6) for e in events}
    kernels = sorted(spent.items(), key=lambda item: -item[1][1])
    count, seconds = (sum(x[at] for x in spent.values()) for at in (0, 1))
    first = ", ".join(f"{name[:40]} {1000 * took:.2f} ms" for name, (_, took) in kernels[:3])
    return {
        "part": "launches", "shape": task.shape(), "inputs": task.tensors.kind, "candidate": one.name, "method": one.method,
        "launches": count, "kernel_s": seconds,
        "kernels": [{"name": name, "launches": n, "seconds": took} for name, (n, took) in kernels[:_NAMED]],
        "shown": f"{task.keys:,} tokens, {one.name}: {count} launches, {1000 * seconds:.2f} ms of kernels; {first}",
    }  # fmt: skip


def against(records: Records, before: Records) -> list[str]:
    """Compare each length with the last record of the same length and method.

    Args:
        records: of this run.
        before: the committed ones.

    Returns:
        a line each; one that says so where nothing was recorded before.
    """
    lines = []
    for record in records:
        if record.get("part") != "lengths":
            continue
        for name in ("ours", "lean", "control"):
            if now := candidate(record, name):
                then = _last(before, record, now)
                old = f"{then['speedup']['value']:.3g}x, error {error_text(then)}" if then else "not recorded"
                speed = f"{now['speedup']['value']:.3g}x" if now["speedup"] else "no exact kernel ran"
                lines.append(f"{record['shape']['keys']:>9,} {name}: {speed}, error {error_text(now)}; before: {old}")
    return lines


def _last(before: Records, record: Record, now: Record) -> Record | None:
    """The last line of what has the same label and as many pairs, on inputs of the same shape."""
    for each in reversed(before):
        same = each.get("part") in _PARTS and (each.get("inputs"), each.get("shape")) == (record["inputs"], record["shape"])
        for found in each["contenders"] if same and not each.get("toy") else ():
            ran = not found.get("failed") and found.get("speedup")
            if ran and all(found.get(key) == now[key] for key in ("label", "pairs_per_query")):
                return dict(found)
    return None
