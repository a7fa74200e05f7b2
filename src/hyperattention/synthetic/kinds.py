"""Kinds of heads: how much of a key is position, word and topic, over how many directions, and what neighbours share.

What sources report of keys, beside what `synthetic/inputs.py` lists:

- *Low rank*: about 80 principal directions of 128 hold 90% of the variance of keys, averaged over layers and heads, in many
  models (Loki, arXiv:2406.02542: its abstract, and its Figure 1 in the words of a public summary; the figure was not seen).
  Logits are of lower rank: 90% of their variance lies in 2 to 11 components in all 5,888 kv heads of five models of widths
  64 and 128, as their author counts it (arXiv:2604.04384, abstract).
- *Alike among neighbours*: "key states exhibit high similarity at the token level within a single sequence" (KVMerger,
  arXiv:2407.08454, abstract); adjacent keys receive similar weights, and adjacent values differ (AsymKV, arXiv:2506.05410,
  abstract). The abstracts give no numbers, so these are measured.

Measured: keys with positions applied, about their mean key, without the first 16; medians over kv heads. The models are
SmolLM2-135M-Instruct (90 heads of width 64, 4,096 tokens of program text) and the package's reference model (8 heads of
width 64, one held-out document of 32,768 bytes); of each kind one text of 8,192 tokens, widths 64 and 128. Quartiles of the
keys are in docs/measured.md, from `benchmarks/head_kinds.py`. The last two rows are development measurements: queries of the
second half against keys of the first, the rank at 90% of q . (k - mean key), and the correlation of the logits of two
neighbouring keys, of the median head.

==========================  =======  =========  ============  =============  ===========  ============
statistic                   SmolLM2  reference  SCATTERED 64  SCATTERED 128  LOW_RANK 64  LOW_RANK 128
==========================  =======  =========  ============  =============  ===========  ============
share in 8 directions          0.46       0.35          0.30           0.24         0.45          0.43
share in 16 directions         0.65       0.54          0.48           0.37         0.64          0.59
share in 32 directions         0.85       0.81          0.77           0.54         0.88          0.77
directions for 90%               40         42            42             78           35            68
cosine of neighbours           0.71       0.77          0.57           0.58         0.66          0.66
cosine of keys 8 apart         0.50       0.49          0.40           0.43         0.49          0.52
cosine of keys 64 apart        0.29       0.34          0.27           0.25         0.25          0.26
rank of logits at 90%            14         29            31             46           14            13
correlation of logits          0.61       0.76          0.43           0.36         0.60          0.57
==========================  =======  =========  ============  =============  ===========  ============

So `LOW_RANK` is near to SmolLM2; the reference model lies between the kinds in rank, and its neighbours are most alike.
`SCATTERED` has the rank of keys that Loki reports, but spreads logits over more directions than either model does. The
amplitudes of `LOW_RANK` were set by this table alone, before any method ran on it: nothing says that errors of methods on it
are those on a model.
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
