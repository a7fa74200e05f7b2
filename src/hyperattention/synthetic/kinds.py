"""Kinds of heads: how much of a key is position, word and topic, over how many directions, and what neighbours share.

What sources report of keys, beside what `synthetic/inputs.py` lists:

- *Low rank*: about 80 principal directions of 128 hold 90% of the variance of keys, over layers and heads of many models (Loki,
  arXiv:2406.02542, Figure 1). Logits are of lower rank still: 90% of their variance lies in 2 to 11 components in all 5,888 kv
  heads of five models of width 64 and 128 (arXiv:2604.04384, abstract).
- *Alike among neighbours*: "key states exhibit high similarity at the token level within a single sequence" (KVMerger,
  arXiv:2407.08454, abstract), and adjacent keys receive similar weights, while adjacent values differ (AsymKV, arXiv:2506.05410,
  abstract). They give no numbers there, so that numbers are measured, with `synthetic/statistics.py`.

Keys with positions applied, about their mean, without the first 16; medians and quartiles over the kv heads of
SmolLM2-135M-Instruct, 4,096 tokens of program text, and of the package's reference model, 32,768 bytes; one text of 8,192 tokens of each kind
(benchmarks/records/head_kinds.jsonl). *Logits*: components with 90% of the variance of q . (k - mean of k), queries of the second
half and keys of the first, and the correlation of the logits of two neighbouring keys (development measurements):

TABLE

So `SCATTERED` has the neighbours of models and, at width 128, Loki's rank, but spreads what queries look for over too many
directions; `LOW_RANK` is nearer to both models there. Its amplitudes were set by this table alone, before any method ran on it.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """The amplitudes of a vector's parts: norms for keys and values; for queries logits of a match (`position`: a power)."""

    position: float
    word: float
    topic: float
    drift: float
    needle: float
    sink: float
    noise: float


VALUE = Parts(position=1.0, word=2.1, topic=1.4, drift=0.0, needle=0.0, sink=0.3, noise=1.2)


@dataclass(frozen=True)
class HeadKind:
    """A kind of heads.

    Args:
        directions: number of directions of words, topics, drift and needles; at most what `head_dim` leaves for them.
        fall: amplitudes of words and topics fall as j ** -fall over these directions.
        pairs: number of rotary pairs with most of the position, at most all of them.
        weak: amplitude of the other pairs, relative to those.
        shared: share in [0, 1) of a key's word that comes from the words just before it, so that neighbours are alike.
        key: amplitudes of keys.
        diffuse: amplitudes of the queries of the most diffuse head.
        sharp: amplitudes of the queries of the sharpest head.
    """

    directions: int
    fall: float
    pairs: int
    weak: float
    shared: float
    key: Parts
    diffuse: Parts
    sharp: Parts

    def __post_init__(self) -> None:
        if self.directions < 1 or self.pairs < 1:
            raise ValueError(f"directions={self.directions} and pairs={self.pairs} must be >= 1: keys need both")
        if not (0 <= self.shared < 1 and 0 <= self.weak <= 1 and self.fall >= 0):
            rule = "shared must be in [0, 1), weak in [0, 1] and fall >= 0"
            raise ValueError(f"shared={self.shared}, weak={self.weak}, fall={self.fall}: {rule}")

    def query_parts(self, sharpness: float) -> Parts:
        """Interpolate between the parts of the most diffuse head (0) and of the sharpest head (1)."""
        ends = zip(vars(self.diffuse).values(), vars(self.sharp).values(), strict=True)
        return Parts(*(low + (high - low) * sharpness for low, high in ends))

    def pair_sizes(self, num_pairs: int) -> list[float]:
        """Return the amplitudes of rotary pairs, relative to equal ones."""
        count = min(self.pairs, num_pairs)
        strong = {i * num_pairs // count for i in range(count)}
        sizes = [1.0 if pair in strong else self.weak for pair in range(num_pairs)]
        norm = math.sqrt(sum(x * x for x in sizes) / num_pairs)
        return [x / norm for x in sizes]


# more than any head has
_ALL = 2**20
# the kind that every record before this one was measured on, and that all others are measured on unless they say otherwise
SCATTERED = HeadKind(
    directions=_ALL,
    fall=0.25,
    pairs=_ALL,
    weak=1.0,
    shared=0.0,
    key=Parts(position=8.5, word=6.5, topic=3.5, drift=2.5, needle=8.0, sink=6.0, noise=2.0),
    diffuse=Parts(position=0.5, word=1.5, topic=1.3, drift=0.5, needle=4.0, sink=9.2, noise=1.5),
    sharp=Parts(position=0.85, word=7.9, topic=2.5, drift=1.0, needle=18.0, sink=15.9, noise=1.5),
)
LOW_RANK = HeadKind(
    directions=24,
    fall=0.6,
    pairs=6,
    weak=0.5,
    shared=0.55,
    key=Parts(position=6.5, word=5.5, topic=5.0, drift=4.5, needle=9.0, sink=6.0, noise=5.2),
    diffuse=Parts(position=0.5, word=1.5, topic=1.7, drift=0.9, needle=4.0, sink=10.5, noise=1.5),
    sharp=Parts(position=0.85, word=7.0, topic=3.3, drift=1.8, needle=23.0, sink=18.0, noise=1.5),
)
