"""A store with an audit: it keeps a copy of every key and value, and compares some outputs with exact attention."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.cache.recent import Recent
from hyperattention.cache.score_rule import PLAIN, ScoreRule
from hyperattention.cache.store import Store
from hyperattention.check import positive
from hyperattention.error.exact_rows import exact_rows
from hyperattention.error.judge import relative_error
from hyperattention.random import uniform
from hyperattention.types import Partial

# first counter of the draws, so that they share no bits with those of a policy under one seed
_STREAM = 0xCA0D17
# the copy is never full: its buffer grows by halves
_BOUNDLESS = 2**62


class AuditedStore(Store):
    """Wrap a store, keep a copy of all keys and values, and compute exact attention for a few tokens drawn at random.

    One position in each run of `every` is drawn by a hash of the seed, for any text: all layers draw the same positions. If
    its query does not read all keys, exact attention over the copy gives the relative error of every head.

    Cost: memory for all keys and values, counted separately from the store's own; exact attention for one token in `every`.
    Guarantee: the outputs of the store are bit-identical to those without an audit.

    Args:
        inner: the store.
        every: length of the runs of positions; one position of each run is drawn.
        seed: seed of the draws.

    Raises:
        ValueError: if `every` is not positive.
    """

    def __init__(self, inner: Store, every: int, seed: int) -> None:
        """Start empty."""
        positive("AuditedStore", every=every)
        self.inner, self.every, self.seed = inner, every, seed
        self._whole, self._new = Recent(), 0
        # for every position, whether its output was approximate; for some of these, the errors of all heads
        self._approximated: list[bool] = []
        self._errors: dict[int, Tensor] = {}

    @property
    def seen(self) -> int:
        """Tokens appended so far, padding included."""
        return self.inner.seen

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.inner.batch

    @property
    def device(self) -> torch.device | None:
        """Device of keys and values."""
        return self.inner.device

    @property
    def num_slots(self) -> int:
        """Slots of the store."""
        return self.inner.num_slots

    @property
    def is_whole(self) -> bool:
        """Whether the store reads every key."""
        return self.inner.is_whole

    @property
    def memory_bytes(self) -> int:
        """Bytes of the store alone."""
        return self.inner.memory_bytes

    @property
    def shadow_bytes(self) -> int:
        """Bytes of the copy."""
        return self._whole.memory_bytes

    @property
    def num_read(self) -> int:
        """Slots that the store reads."""
        return self.inner.num_read

    @property
    def approximated(self) -> Bool[Tensor, " tokens"]:
        """Return for each position whether its query did not read every key."""
        return torch.tensor(self._approximated, dtype=torch.bool, device="cpu")

    @property
    def errors(self) -> Float[Tensor, "heads audited"]:
        """Return the relative errors of the drawn positions, in order, each the mean over the batch rows that count.

        Returns:
            the errors; no columns if no position was both approximate and drawn.
        """
        columns = [self._errors[position] for position in sorted(self._errors)]
        return torch.stack(columns, 1) if columns else torch.empty(0, 0, dtype=torch.float32, device="cpu")

    @property
    def audited(self) -> tuple[int, ...]:
        """Positions that were drawn and approximate."""
        return tuple(sorted(self._errors))

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the new keys and values, and append them to the store."""
        self._whole.append(k, v, _BOUNDLESS)
        self._new = k.shape[2]
        self._approximated += [False] * self._new
        return self.inner.append(k, v)

    def mask_padding(self, live: Tensor) -> None:
        """Mark the padding in both the store and the copy."""
        self._whole.mask_padding(live)
        self.inner.mask_padding(live)

    def attend(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> Partial:
        """Compute attention by the store, and measure its error at the drawn positions."""
        part = self.inner.attend(q, scale, rule)
        if not self.inner.is_whole:
            begin = self.seen - self._new
            self._approximated[begin:] = [True] * self._new
            drawn = are_drawn(torch.arange(begin, self.seen, dtype=torch.int64, device="cpu"), self.every, self.seed)
            if bool(drawn.any()):
                self._judge(q, scale, rule, part.out, drawn.nonzero()[:, 0].to(q.device))
        return part

    def _judge(self, q: Tensor, scale: float, rule: ScoreRule, out: Tensor, places: Tensor) -> None:
        """Compare the drawn rows with exact ones; no other exact rows are computed, because a prompt chunk has many rows."""
        live, begin = self._whole.tensors[2], self.seen - self._new
        exact = self._exact(q, scale, rule, places)
        error = relative_error(out[:, :, places].to(exact.dtype) - exact, exact)  # [batch, heads, places]
        counts = live[:, begin + places][:, None]  # [batch, 1, places]
        num_live = counts.sum(0)
        mean = error.masked_fill(~counts, 0.0).sum(0) / num_live  # [heads, places]
        for number, place in enumerate(places.tolist()):
            # a column of padding in every row is not a token
            if int(num_live[0, number]):
                self._errors[begin + place] = mean[:, number].cpu()

    def _exact(self, q: Tensor, scale: float, rule: ScoreRule, places: Tensor) -> Tensor:
        k, v, live = self._whole.tensors
        begin = self.seen - self._new
        if rule.is_plain:
            mask = None if bool(live.all()) else live
            return exact_rows(q[:, :, places], k, v, begin + 1 + places, scale, mask)
        # one row at a time, over the keys up to its own position; in float32 at least
        rows = q.to(torch.promote_types(q.dtype, torch.float32)).split(1, 2)
        parts = [
            rule.drop_sinks(self._whole.first(begin + 1 + place).attend(rows[place], scale=scale, softcap=rule.softcap))
            for place in places.tolist()
        ]
        return torch.cat([part.out for part in parts], 2)

    def end_step(self, q: Tensor, scale: float, rule: ScoreRule = PLAIN) -> None:
        """Hand on."""
        self.inner.end_step(q, scale, rule)

    def take_rows(self, index: Tensor) -> None:
        """Select batch rows of both; measured errors stay."""
        self.inner.take_rows(index)
        self._whole.take_rows(index)

    def crop(self, num: int) -> None:
        """Remove the latest tokens and their measured errors."""
        self.inner.crop(num)
        self._whole.crop(num)
        del self._approximated[self.seen :]
        self._errors = {position: error for position, error in self._errors.items() if position < self.seen}
        self._new = 0

    def move(self, device: torch.device) -> None:
        """Move both."""
        self.inner.move(device)
        if self._whole.batch:
            k, v, live = (x.to(device) for x in self._whole.tensors)
            self._whole.restore(k, v, live)

    def state(self) -> dict[str, Tensor]:
        """Return the state of the store alone: the copy serves the audit and is not saved."""
        return self.inner.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Raise, because a state does not contain the keys that the store dropped.

        Raises:
            ValueError: always.
        """
        raise ValueError("an audit needs every key from the first token on: restore into a cache without audit=")


def are_drawn(position: Int[Tensor, " tokens"], every: int, seed: int) -> Bool[Tensor, " tokens"]:
    """Return which positions an audit measures: one, drawn at random, in each run of `every`.

    Args:
        position: positions of tokens.
        every: length of a run.
        seed: seed of the draws.

    Returns:
        whether each was drawn.
    """
    run, place = position // every, position % every
    return (uniform((_STREAM, seed, run), position.device) * every).long() == place
