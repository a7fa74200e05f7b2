"""The parts of structured inputs: a text that all heads read, and heads that compute queries, keys and values from it.

Everything is a function of (seed, row, head, position), so that a shorter text is the beginning of a longer one; sources and
measured statistics are in `hyperattention.synthetic`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from hyperattention.random import hash_bits, normal, uniform
from hyperattention.synthetic.kinds import VALUE, HeadKind, Parts

# tokens are computed in stretches of one size: all matrix products have one shape, so rounding is the same at every length
STRETCH = 2048
_NUM_SINKS, _NUM_WORDS, _NUM_TOPICS, _TOPIC_WORDS = 4, 2048, 48, 128
_SEGMENT_SIZE, _BLOCK_SIZE, _DRIFT_SIZE, _SHARED_SIZE = 768, 48, 192, 8
PERIOD_SIZE, RUN_SIZE, GAP = 256, 4, 5
# prime to the sizes of blocks and tiles, so that no border of phrases keeps to theirs
PHRASE_SIZE = 11
_ROTARY_BASE = 1e5
# second counters (the first is the seed), which separate the streams of random numbers
_SEGMENT, _BLOCK, _WORD, _LOOK, _SPAN, _TARGET, _NEEDLE, _TABLE, _NOISE, _DRIFT, _LOCALITY, GAUSSIAN = range(12)


_NORM, _LEAST_CONE, _POPULARITY, _WOBBLE = 15.0, 4.0, 0.7, 0.2


def _nibbles(counters: Sequence[int | Tensor], rows: Int[Tensor, " tokens"], width: int) -> Float[Tensor, "tokens width"]:
    # eight uniform values of unit variance from one hash; the products and sums that follow make them nearly normal
    bits = hash_bits(
        [*counters, rows[:, None], torch.arange(-(-width // 8), dtype=torch.int64, device=rows.device)], rows.device
    )
    shifts = torch.arange(0, 32, 4, dtype=torch.int64, device=rows.device)
    return (((bits[..., None] >> shifts) & 15).float().flatten(1)[:, :width] - 7.5) / math.sqrt((16**2 - 1) / 12)


def _zipf(u: Float[Tensor, " tokens"], num: int) -> Int[Tensor, " tokens"]:
    # P(rank) ~ 1 / (rank + 4): Zipf's law is flat for the most frequent words of real texts
    return (4 * torch.exp(u * math.log1p(num / 4)) - 4).long().clamp(max=num - 1)


def _rotary(positions: Int[Tensor, " tokens"], num_pairs: int, kind: HeadKind) -> Float[Tensor, "tokens rotated"]:
    rates = _ROTARY_BASE ** (-torch.arange(num_pairs, dtype=torch.int64, device=positions.device).double() / num_pairs)
    angles = positions[:, None] * rates
    sizes = torch.tensor(kind.pair_sizes(num_pairs), dtype=torch.float32, device=positions.device).repeat(2)
    return torch.cat([angles.cos(), angles.sin()], -1).float() * sizes / math.sqrt(num_pairs)


def _topics(seed: int, row: int, positions: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    segment = uniform([seed, _SEGMENT, row, positions // _SEGMENT_SIZE], positions.device)
    block = uniform([seed, _BLOCK, row, positions // _BLOCK_SIZE], positions.device)
    # 60% of a segment's blocks have the segment's topic, the others their own; squares make some topics more frequent
    return (_NUM_TOPICS * torch.where(block < 0.6, segment, (block - 0.6) / 0.4).square()).long()


def _words(counters: Sequence[int | Tensor], topic: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    bits = hash_bits(counters, topic.device)
    u = (bits >> 8).double() * 2.0**-24
    own = (topic * 41 + 64 + _zipf(u, _TOPIC_WORDS)) % _NUM_WORDS
    return torch.where((bits & 255) < 128, own, _zipf(u, _NUM_WORDS))


def place_in_span(seed: int, positions: Int[Tensor, " tokens"], half: int) -> Int[Tensor, " tokens"]:
    """Return the place in the period's span of needles (half 0) or run of their queries (half 1): inside if 0 to 3."""
    room = PERIOD_SIZE // 2 - RUN_SIZE - _NUM_SINKS
    draw = uniform([seed, _SPAN, half, positions // PERIOD_SIZE], positions.device)
    return positions % PERIOD_SIZE - (half * PERIOD_SIZE // 2 + _NUM_SINKS + (draw * room).long())


def target_period(seed: int, row: int, head: int, period: Int[Tensor, " needles"]) -> Int[Tensor, " needles"]:
    """Draw the period whose needles are looked for; negative if no earlier period is far enough back."""
    draw = uniform([seed, _TARGET, row, head, period], period.device)
    return torch.where(period >= GAP, (draw * (period - GAP + 1)).long(), -1)


@dataclass(frozen=True)
class Text:
    """A stretch of one text, which all heads read: its position, its topics and its words."""

    seed: int
    row: int
    positions: Int[Tensor, " tokens"]
    topic: Int[Tensor, " tokens"]
    word: Int[Tensor, " tokens"]
    rotary: Float[Tensor, "tokens rotated"]

    @staticmethod
    def at(seed: int, row: int, start: int, num_pairs: int, kind: HeadKind, device: torch.device) -> "Text":
        """Make the stretch that begins at a position."""
        positions = torch.arange(start, start + STRETCH, dtype=torch.int64, device=device)
        topic, rotary = _topics(seed, row, positions), _rotary(positions, num_pairs, kind)
        return Text(seed, row, positions, topic, _words([seed, _WORD, row, positions], topic), rotary)

    def word_at(self, positions: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
        """Return the words at any positions, of this stretch or of another."""
        return _words([self.seed, _WORD, self.row, positions], _topics(self.seed, self.row, positions))

    def looks(self, head: int) -> Int[Tensor, " tokens"]:
        """Draw the word that each query looks for: its own, or (probability 5/8) that of its group of eight neighbours."""
        counters = [self.seed, _LOOK, self.row, head]
        shared = (hash_bits([*counters, 0, self.positions], self.positions.device) & 7) < 5
        place = torch.where(shared, self.positions // _SHARED_SIZE, self.positions)
        return _words([*counters, 1 + shared.long(), place], self.topic)

    def run(self, half: int) -> tuple[Int[Tensor, " needles"], Int[Tensor, " needles"], Int[Tensor, " needles"]]:
        """Return index, period and place of the needles (half 0) or of the queries that look for a needle (half 1)."""
        place = place_in_span(self.seed, self.positions, half)
        index = ((place >= 0) & (place < RUN_SIZE)).nonzero()[:, 0]
        return index, self.positions[index] // PERIOD_SIZE, place[index]


@dataclass(frozen=True)
class Head:
    """The fixed vectors of a kv head, like weights of a model; columns 0 and 1 of the basis are the axes of the cones."""

    seed: int
    index: int
    head_dim: int
    kind: HeadKind
    basis: Float[Tensor, "content content"]
    words: Float[Tensor, "words axes"]
    topics: Float[Tensor, "topics axes"]
    popularity: Float[Tensor, " words"]
    value_words: Float[Tensor, "words value_dim"]
    value_topics: Float[Tensor, "topics value_dim"]
    value_mean: Float[Tensor, "1 value_dim"]

    @staticmethod
    def of(seed: int, index: int, head_dim: int, value_dim: int, kind: HeadKind, device: torch.device) -> "Head":
        """Draw the vectors of one kv head."""
        content = head_dim - 2 * (head_dim // 4)
        axes = min(kind.directions, content - 2)

        def table(which: int, *shape: int) -> Tensor:
            return normal(
                [seed, _TABLE, index, which, torch.arange(math.prod(shape), dtype=torch.int64, device=device)], device
            ).view(shape)

        basis = torch.linalg.qr(table(0, content, content).cpu())[0].to(device)
        falls = torch.arange(1, axes + 1, dtype=torch.int64, device=device).double() ** -kind.fall
        keys = [normalize(table(1 + i, num, axes) * falls, dim=-1) for i, num in enumerate((_NUM_WORDS, _NUM_TOPICS))]
        values = [table(4 + i, num, value_dim) / math.sqrt(value_dim) for i, num in enumerate((_NUM_WORDS, _NUM_TOPICS, 1))]
        return Head(seed, index, head_dim, kind, *(x.float() for x in (basis, *keys, table(3, _NUM_WORDS), *values)))

    @property
    def gain(self) -> float:
        """Factor of the parts, the fourth root of head_dim / 64, so that logits divided by sqrt(head_dim) stay as at 64."""
        return (self.head_dim / 64) ** 0.25

    @property
    def cone(self) -> float:
        """Size of the keys' common direction: the remaining part of their norm."""
        key = self.kind.key
        rest = sum(x**2 for x in (key.position, key.word, key.topic, key.drift, key.noise))
        return math.sqrt(max(_NORM**2 - self.gain**2 * rest, _LEAST_CONE**2))

    def noise(self, text: Text, stream: int, width: int) -> Float[Tensor, "tokens width"]:
        """Draw vectors of norm near 1, independent between tokens."""
        counters = [self.seed, _NOISE, text.row, self.index, stream]
        return _nibbles(counters, text.positions, width) / math.sqrt(width)

    def drift(self, text: Text) -> Float[Tensor, "tokens axes"]:
        """Return a smooth random walk: a normal vector every 192 tokens, interpolated with constant variance."""
        first, num_axes = int(text.positions[0]) // _DRIFT_SIZE, self.words.shape[1]
        knots = first + torch.arange(STRETCH // _DRIFT_SIZE + 3, dtype=torch.int64, device=text.positions.device)
        axes = torch.arange(num_axes, dtype=torch.int64, device=knots.device)
        values = normal([self.seed, _DRIFT, text.row, self.index, knots[:, None], axes], knots.device).float()
        left = text.positions // _DRIFT_SIZE - first
        angle = (text.positions % _DRIFT_SIZE)[:, None].float() * (math.pi / 2 / _DRIFT_SIZE)
        return (values[left] * angle.cos() + values[left + 1] * angle.sin()) / math.sqrt(num_axes)

    def needle(
        self, row: int, period: Int[Tensor, " needles"], place: Int[Tensor, " needles"]
    ) -> Float[Tensor, "needles axes"]:
        """Draw the unit vectors of needles, which their queries look for."""
        axes = torch.arange(self.words.shape[1], dtype=torch.int64, device=period.device)
        x = normal([self.seed, _NEEDLE, row, self.index, period[:, None], place[:, None], axes], period.device)
        return normalize(x.float(), dim=-1)

    def shown(self, text: Text) -> Float[Tensor, "tokens axes"]:
        """Return the word that each key shows: its own, and where neighbours share words those just before it."""
        own = self.words[text.word]
        if not self.kind.shared:
            return own
        last = text.positions // PHRASE_SIZE
        knots = last[0] - 1 + torch.arange(STRETCH // PHRASE_SIZE + 3, dtype=torch.int64, device=last.device)
        words, left = self.words[text.word_at((knots * PHRASE_SIZE).clamp(min=0))], last - last[0]
        angle = (text.positions % PHRASE_SIZE)[:, None].float() * (math.pi / 2 / PHRASE_SIZE)
        context = words[left] * angle.cos() + words[left + 1] * angle.sin()
        return math.sqrt(1 - self.kind.shared) * own + math.sqrt(self.kind.shared) * context

    def keys(self, text: Text, drift: Float[Tensor, "tokens axes"]) -> Float[Tensor, "tokens head_dim"]:
        """Return keys: the cone plus parts for position, word, topic, drift and needles; the first tokens are sinks."""
        key, num_axes = self.kind.key, self.words.shape[1]
        content = key.word * self.shown(text) + key.topic * self.topics[text.topic] + key.drift * drift
        index, period, place = text.run(0)
        content[index] = key.needle * self.needle(text.row, period, place)
        x = self.gain * key.noise * self.noise(text, 0, len(self.basis))
        x[:, 2 : 2 + num_axes] += self.gain * content
        x[:, 0] += self.cone + _POPULARITY * self.popularity[text.word]
        position = self.gain * key.position * text.rotary
        if text.positions[0] == 0:
            # opposite to the cone, without position, each with a smaller score than the previous one
            x[:_NUM_SINKS], position[:_NUM_SINKS] = 0, 0
            x[:_NUM_SINKS, 0] = -key.sink * (1 - torch.arange(_NUM_SINKS, dtype=torch.float32, device=x.device) / 8)
        return torch.cat([position, x @ self.basis.T], -1)

    def values(self, text: Text) -> Float[Tensor, "tokens value_dim"]:
        """Return values with parts for the word and the topic; those of sinks are small."""
        v = VALUE.word * self.value_words[text.word] + VALUE.topic * self.value_topics[text.topic]
        v += VALUE.position * self.value_mean + VALUE.noise * self.noise(text, 1, v.shape[1])
        if text.positions[0] == 0:
            v[:_NUM_SINKS] *= VALUE.sink / 3
        return v

    def queries(
        self, text: Text, drift: Float[Tensor, "tokens axes"], head: int, want: Parts
    ) -> Float[Tensor, "tokens head_dim"]:
        """Return queries with parts for near positions, a word, the topic, the sinks and, in a few, a needle."""
        key, num_axes = self.kind.key, self.words.shape[1]
        # a part of norm `unit * logit / key norm` meets the key's part with that logit
        unit = math.sqrt(self.head_dim) / self.gain
        content = (want.word / key.word) * self.words[text.looks(head)]
        content += (want.topic / key.topic) * self.topics[text.topic]
        content += (want.drift / key.drift) * drift
        index, period, place = text.run(1)
        target = target_period(self.seed, text.row, head, period)
        live = target >= 0
        content[index[live]] = (want.needle / key.needle) * self.needle(text.row, target[live], place[live])
        x = self.gain * want.noise * self.noise(text, 2 + head, len(self.basis))
        x[:, 2 : 2 + num_axes] += unit * content
        x[:, 0] -= want.sink * math.sqrt(self.head_dim) / (self.cone + key.sink)
        # the mean of cosines at geometric rates falls by 1 / log(base) for each e-fold of distance
        local = unit * want.position * math.log(_ROTARY_BASE) / key.position
        wobble = normal([self.seed, _LOCALITY, text.row, head, text.positions], x.device).float()[:, None]
        position = local * (1 + _WOBBLE * wobble).clamp(min=0.2) * text.rotary
        # the second axis, where keys have only noise, fills the norm up to 15
        rest = position.square().sum(-1) + x.square().sum(-1) - x[:, 1].square()
        x[:, 1] += (_NORM**2 - rest).clamp(min=_LEAST_CONE**2).sqrt()
        return torch.cat([position, x @ self.basis.T], -1)
