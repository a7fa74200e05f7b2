"""What all parts of the GPU benchmark share: the sizes, the time that is left, and where records go."""

import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hyperattention import Draw, HierarchicalSearch, Method, Sinks, Window, lean_method
from hyperattention.bench.rows import find_default
from hyperattention.files.records import environment, plain
from hyperattention.select import DrawAlike

Record = dict[str, object]


def find_lean() -> Method:
    """Return the lean method below 131,072 keys: the default of a GPU when an H100 was measured."""
    method = lean_method(65_536, device="cuda")
    if not isinstance(method, Method):
        raise TypeError(f"the lean method is {method!r} at 65,536 keys: it must be a Method to be measured")
    return method


@dataclass(frozen=True)
class Plan:
    """The sizes of one run: those of the issue by default."""

    method: Method = field(default_factory=lambda: find_default("cuda"))
    # what --quick measures beside it
    lean: Method = field(default_factory=find_lean)
    toy: bool = False
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    long: int = 131072
    longest: int = 2**20
    shorter: tuple[int, ...] = (65536, 32768)
    crossover: tuple[int, ...] = (2048, 3072, 4096, 6144, 8192, 12288, 16384)
    probe: int = 16384
    rounds: int = 5
    audit_rows: int = 256
    layers: int = 32
    hidden: int = 4096
    mlp: int = 14336
    mlp_chunk: int = 8192
    batches: tuple[int, ...] = (1, 8)
    copied_bytes: int = 2**32
    matmul_size: int = 8192
    peer_block: int = 256
    peer_exact_below: int = 4096


TOY = Plan(
    method=Method(Sinks(4), Window(32), DrawAlike(28, rows=16, pooled=4)), toy=True, device="cpu", dtype=torch.float32,
    lean=Method(Sinks(4), Window(32), Draw(28, by=HierarchicalSearch())),
    heads=4, kv_heads=2, head_dim=32, long=1024, longest=2048, shorter=(512,), crossover=(512, 1024), probe=512, rounds=1,
    audit_rows=64, layers=2, hidden=64, mlp=128, mlp_chunk=256, batches=(1, 2), copied_bytes=2**22, matmul_size=256,
    peer_block=32, peer_exact_below=256,
)  # fmt: skip


class OutOfTime(BaseException):
    """Raised by the alarm of `limit`; no `except Exception` around a candidate may swallow it."""


@dataclass(frozen=True)
class Clock:
    """Counts down to a deadline."""

    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def within(self, seconds: float) -> "Clock":
        return Clock(min(self.deadline, time.monotonic() + seconds))


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Interrupt what runs longer: a part that hangs must not cost those after it their time."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Journal:
    """Writes each record as soon as it is measured, so that a run that is cut off loses nothing."""

    path: Path
    where: Mapping[str, object]
    records: list[Record] = field(default_factory=list)

    def write(self, record: Mapping[str, object]) -> None:
        full = {"kind": "gpu"} | {key: plain(value) for key, value in record.items()} | dict(self.where)
        self.records.append(full)
        with self.path.open("a") as file:
            file.write(json.dumps(full) + "\n")
        print(f"  {summary(full)}", flush=True)


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run, copying and multiplying."""

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True)
class Session:
    """One run of the benchmark."""

    plan: Plan
    clock: Clock
    journal: Journal
    ceilings: Ceilings | None = None
    peer: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.device)


def summary(record: Mapping) -> str:
    """One record in one line."""
    for why in ("skipped", "failed"):
        if why in record:
            return f"{why}: {record[why]}"
    shape = record.get("shape", {})
    title = " ".join(str(x) for x in (shape.get("keys", ""), record.get("inputs", ""), shape.get("title", "")) if x)
    shown = []
    for each in record.get("contenders", ()):
        if each.get("failed"):
            shown.append(f"{each['name']} failed")
            continue
        error = "" if not each["error"] else f", error {each['error']['mean']:.3g}"
        times = "" if not each["speedup"] else f" = {each['speedup']['value']:.3g}x"
        shown.append(f"{each['name']} {1000 * each['median_s']:.3g} ms{times}{error}")
    return f"{title}: {'; '.join(shown)}" if shown else f"{record['part']}: {record.get('shown', '')}"


def describe_run(plan: Plan, commit: str | None) -> Record:
    """Say where and how this run is measured; every record carries it."""
    where = {key: value for key, value in environment().items() if key != "process_peak_bytes"}
    where |= {"commit": commit or where["commit"], "toy": plan.toy, "dtype": str(plan.dtype).removeprefix("torch.")}
    # folders of one machine mean nothing in a committed record
    words = [Path(word).name if "/" in word else word for word in sys.argv]
    where |= {"seed": plan.seed, "command": shlex.join(words)}
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        where |= {"device": properties.name, "device_memory_bytes": properties.total_memory}
        where["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return where


def reason_of(error: BaseException) -> str:
    """The first lines of an error: enough to know why, short enough for a record."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def forget() -> None:
    """Give memory back between cases: what one candidate kept must not starve the next."""
    # a device that reports an error says so again where it matters
    with suppress(RuntimeError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
