"""The world of a process group: rows as bytes, counted, with a time limit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from weakref import WeakSet

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from hyperattention.distributed.errors import ExchangeError
from hyperattention.distributed.numbers import number_of
from hyperattention.distributed.seal import SIZE, Seals
from hyperattention.distributed.traffic import Round
from hyperattention.pooled.route import Route, World

# groups in which an exchange failed. Their ranks are out of step: a message of a later call would be taken for one of the
# failed call, and gloo ends the process that gets it. The state is that of connections, and torch keeps no note of it
_FAILED: "WeakSet[dist.ProcessGroup]" = WeakSet()


class Group(World):
    """The ranks of a process group.

    Args:
        group: the process group.
        device: device of the tensors that are sent.
        timeout: time that an exchange may take; None for the limit of the group.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: timedelta | None = None) -> None:
        self.group = group
        self.device = device
        self.timeout = timeout
        # of the ranks of the group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self.rounds: list[Round] = []
        # of the plan that all ranks must share; every seal holds it
        self.plan = 0

    @property
    def rank(self) -> int:
        """Number of this rank in the group."""
        return self._rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._size

    def move(self, route: Route, x: Shaped[Tensor, "rows width"]) -> Shaped[Tensor, "moved width"]:
        """Send rows, and receive others, without a gradient."""
        came = self._exchange(route.purpose, x.index_select(0, route.send), route.sent, route.received)
        moved = x.new_zeros(route.rows, x.shape[1]).index_copy_(0, route.place, came)
        return moved.index_copy_(0, route.put, x.index_select(0, route.kept))

    def move_back(
        self, route: Route, purpose: str, gradient: Shaped[Tensor, "moved width"], rows: int
    ) -> Shaped[Tensor, "rows width"]:
        """Send gradients, or results, the way back: the transpose of `move`.

        Args:
            route: the route of the way there.
            purpose: what moves.
            gradient: gradient of what was moved.
            rows: rows of what was sent from.

        Returns:
            the gradient of what was sent from.
        """
        came = self._exchange(purpose, gradient.index_select(0, route.place), route.received, route.sent)
        # one sum, on a CPU in the order of the ranks, this rank among them
        at = sum(route.sent[: self.rank])
        row = torch.cat([route.send[:at], route.kept, route.send[at:]])
        given = torch.cat([came[:at], gradient.index_select(0, route.put), came[at:]])
        return gradient.new_zeros(rows, gradient.shape[1]).index_add_(0, row, given)

    def gather(self, purpose: str, x: Shaped[Tensor, " numbers"]) -> Shaped[Tensor, "ranks numbers"]:
        """Give every rank the numbers of every rank, equally many.

        Args:
            purpose: what is gathered.
            x: the numbers of this rank.

        Returns:
            those of each rank.
        """
        counts = tuple(0 if rank == self.rank else len(x) for rank in range(self.size))
        came = self._exchange(purpose, x.repeat(self.size - 1)[:, None], counts, counts).view(self.size - 1, len(x))
        return torch.cat([came[: self.rank], x[None], came[self.rank :]])

    def _exchange(self, purpose: str, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows to the other ranks, by rank, and receive as many from each as `received` says."""
        if self.size == 1:
            return data
        if self.group in _FAILED:
            raise ExchangeError(self._message(purpose, "an earlier exchange of this process group failed"))
        with self.together():
            return self._sealed(purpose, data, sent, received)

    def _sealed(self, purpose: str, data: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        number = number_of(f"{purpose}, round {len(self.rounds)}, {data.shape[1]} of {data.dtype}, plan {self.plan}")
        seals = Seals(number, self.rank)
        each = data.shape[1] * data.element_size()
        out, into = (tuple(count and count * each + SIZE for count in counts) for counts in (sent, received))
        own, buffer = seals.close(data, sent), torch.zeros(sum(into), dtype=torch.uint8, device=self.device)
        self.rounds.append(Round(purpose, out, into))
        self._wait(purpose, lambda: dist.all_to_all_single(buffer, own, into, out, group=self.group, async_op=True))
        rows, damaged = seals.open(buffer, received, data)
        if damaged:
            raise ExchangeError(self._message(purpose, f"what came from ranks {damaged} is not what they were to send"))
        return rows

    def _wait(self, purpose: str, begin: Callable[[], dist.Work | None]) -> None:
        """Run an exchange; whatever goes wrong in it says what was exchanged."""
        try:
            work = begin()
            if work is None:
                return
            done = work.wait() if self.timeout is None else work.wait(self.timeout)
        except RuntimeError as error:
            raise ExchangeError(self._message(purpose, str(error))) from error
        if done is False:
            raise ExchangeError(self._message(purpose, "the exchange did not end"))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run what all ranks run: after an error in the middle of it this rank is out of step with the others."""
        try:
            yield
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        """Give the group up: it cannot be used on, and where the backend can, whoever waits for this rank raises as well."""
        if self.size == 1 or self.group in _FAILED:
            return
        _FAILED.add(self.group)
        # a backend that has no abort raises RuntimeError; its ranks then wait for their own time limit
        with suppress(RuntimeError):
            self.group.abort()

    def _message(self, purpose: str, reason: str) -> str:
        limit = "the time limit of the process group" if self.timeout is None else f"{self.timeout.total_seconds():g} s"
        return (
            f"rank {self.rank} of {self.size}: the exchange of {purpose} failed ({reason.strip()}). Another rank ended, "
            f"raised an error or was slower than {limit}; no output was computed. Look for the first error among the "
            "ranks' logs, and start all ranks again; if a rank is only slow, give a larger timeout"
        )
