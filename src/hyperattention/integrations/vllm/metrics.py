"""The counts of this process in Prometheus and in vLLM's log."""

import atexit
import time
from functools import cache

from prometheus_client import Counter, Histogram  # pyright: ignore[reportMissingImports]
from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]

from hyperattention.integrations.vllm.choice import Choice
from hyperattention.integrations.vllm.counts import ServedCounter, ServedCounts, is_audited
from hyperattention.integrations.vllm.options import Options

# seconds between two lines of the log, as vLLM's own
_EVERY = 10.0
_ERRORS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0)


class ServedMetrics:
    """The counter of a process, its metrics and its log. Prometheus holds one of each name in a process."""

    def __init__(self) -> None:
        """Register the metrics, and log the counts once more when the process ends."""
        self._counter, self._said, self._at = ServedCounter(), "", float("-inf")
        self._log = init_logger("vllm.hyperattention")
        self._calls = Counter(
            "hyperattention_attention_calls", "Attention calls of a layer and request, approximated or exact.", ["kind"]
        )
        self._pairs = Counter(
            "hyperattention_attention_pairs",
            "Pairs of query and key in approximated calls: listed, and those of exact attention.",
            ["kind"],
        )
        self._error = Histogram(
            "hyperattention_relative_error", "Mean relative error of the rows of an audited call.", buckets=_ERRORS
        )
        self._decoding_error = Histogram(
            "hyperattention_decoding_relative_error",
            "Mean relative error of the heads of an audited call of a request that generates.",
            buckets=_ERRORS,
        )
        atexit.register(self.say)

    @property
    def counts(self) -> ServedCounts:
        """The counts so far."""
        return self._counter.counts

    def approximate(self, pairs: tuple[float, float], options: Options, *, decoding: bool = False) -> bool:
        """Count an approximated call, with its listed and exact pairs; return whether it is audited."""
        # asked before the call is counted: the first call has number 0
        audited = is_audited(self.counts.of(decoding=decoding).calls, options.audit_every, options.seed)
        self._counter.approximate(pairs, decoding=decoding)
        suffix = " decoding" if decoding else ""
        self._calls.labels(kind=f"approximated{suffix}").inc()
        self._pairs.labels(kind=f"listed{suffix}").inc(pairs[0])
        self._pairs.labels(kind=f"exact{suffix}").inc(pairs[1])
        return audited

    def exactly(self, reason: str, calls: int = 1) -> None:
        """Count exact calls for a reason."""
        if calls:
            self._counter.exactly(reason, calls)
            self._calls.labels(kind=reason).inc(calls)

    def audit(self, error: float, *, decoding: bool = False) -> None:
        """Count an audited call, with its mean relative error."""
        self._counter.audit(error, decoding=decoding)
        (self._decoding_error if decoding else self._error).observe(error)

    def describe(
        self, choice: Choice, layers: list[int], unread: str | None, *, decoding: str, unreached: str | None
    ) -> None:
        """Log what may be approximated, before any request; how tokens are generated; and what no request can reach."""
        if unreached is not None:
            self._log.warning("hyperattention: %s", unreached)
        if choice.min_length is None or not layers:
            self._log.info("hyperattention: prompts are exact in every layer of this group; %s", decoding)
            return
        self._log.info(
            "hyperattention: queries of prompts from position %d on are approximated in layers %s by %r; %s",
            choice.min_length, layers, choice.method, decoding,
        )  # fmt: skip
        if unread is not None:
            self._log.warning("hyperattention: only the shape of the plan's model was compared: %s", unread)

    def say_sometimes(self) -> None:
        """Log the counts, if the last line is some seconds old and they have changed."""
        if time.monotonic() - self._at >= _EVERY:
            self.say()

    def say(self) -> None:
        """Log the counts, if anything was approximated and they have changed."""
        counts = self.counts
        if counts.approximated and str(counts) != self._said:
            self._said, self._at = str(counts), time.monotonic()
            self._log.info("hyperattention: %s", counts)


@cache
def served_metrics() -> ServedMetrics:
    """Return the metrics of this process."""
    return ServedMetrics()


def read_counts() -> ServedCounts:
    """Read the counts of this process: of an engine in the same process, or of a worker from inside.

    Returns:
        the counts since the process began.
    """
    return served_metrics().counts
