"""Time calls on the device in turn, and weigh them: events on CUDA, the wall clock elsewhere."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperattention.bench.timing import Ratio, Timing, speedup

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]

# a sample lasts about so long: short calls are queued as a model queues them, and events resolve half a microsecond
_SAMPLE_SECONDS, _MOST_CALLS = 0.02, 20


@dataclass
class Stopwatch:
    """Adds up the time of marked stretches without stopping the device between them."""

    device: torch.device
    marks: list = field(default_factory=list)

    def mark(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def running(self) -> Iterator[None]:
        begin = self.mark()
        yield
        self.marks.append((begin, self.mark()))

    def seconds(self) -> float:
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in self.marks)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.marks) / 1000


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Time a few calls in a row; seconds of one. The cost of launching counts where the device waits for it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    watch = Stopwatch(device)
    with watch.running():
        for _ in range(calls):
            call()
    return watch.seconds() / calls


@dataclass(frozen=True)
class Trial:
    """One call: what it returned, how long it took, and the most memory it held beyond its inputs."""

    outputs: Outputs
    seconds: float
    memory_bytes: int | None


def try_out(call: Call, device: torch.device) -> Trial:
    kept: list[Outputs] = []
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = seconds_of(lambda: kept.append(call()), device)
    memory = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    return Trial(kept[0], seconds, memory)


def calls_in_sample(seconds: float, device: torch.device) -> int:
    return max(1, min(_MOST_CALLS, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-6)))) if device.type == "cuda" else 1


def interleave(
    calls: Mapping[str, tuple[Callable[[], object], int]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Sample each call once a round, beginning with another one each time; a call comes with its calls in a sample."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % max(1, len(names))
        for name in names[start:] + names[:start]:
            call, count = calls[name]
            seconds[name].append(seconds_of(call, device, count))
    return {name: Timing(tuple(spent)) for name, spent in seconds.items()}


def ratio_of(base: Timing, other: Timing) -> Ratio:
    """Median and quartiles of the ratios: of single rounds where both were timed in the same ones, else of all pairs."""
    if len(base.seconds) == len(other.seconds):
        return speedup(base, other)
    pairs = Timing(tuple(a / b for a in base.seconds for b in other.seconds))
    return Ratio(pairs.median, *pairs.quartiles)
