"""Every method that the laws are tested on: a new method is one more line here."""

from dataclasses import dataclass, replace

import hyperattention as ha
from hyperattention import rivals, select
from hyperattention.methods.base import AttentionMethod
from hyperattention.select.density import Density
from hyperattention.select.stage import Stage


@dataclass(frozen=True)
class Case:
    """A method small enough to run everywhere.

    Args:
        name: what the test is called.
        method: the method.
        num_tokens: a length at which it leaves most keys out, several tiles long and no multiple of the tile.
        exact_up_to: a length up to which its budget holds every key.
        for_three: the method that does for groups of three equal heads what `method` does for one head, if it is another:
            lists of a number of rows, of whatever heads, need three times as many.
    """

    name: str
    method: AttentionMethod
    num_tokens: int = 150
    exact_up_to: int = 16
    for_three: AttentionMethod | None = None


NEAR = ha.Sinks(4), ha.Window(16)
CONTROL = ha.Method(*NEAR, ha.Draw(16, by=ha.Uniform()), tile=16)


def _ranked(*blocks: ha.TopBlocks) -> ha.Method:
    return ha.Method(ha.Sinks(4), ha.Window(16), *blocks, ha.Draw(16), tile=16)


def _after_window(*stages: Stage) -> ha.Method:
    return ha.Method(ha.Sinks(4), ha.Window(16), *stages, tile=16)


def _alike(name: str, *before: Stage, tile: int, exact_up_to: int, stage: select.DrawAlike, num_tokens: int = 150) -> Case:
    one, three = (ha.Method(*before, each, tile=tile) for each in (stage, replace(stage, rows=3 * stage.rows)))
    return Case(name, one, num_tokens=num_tokens, exact_up_to=exact_up_to, for_three=three)


def _drawn(density: Density) -> ha.Method:
    return ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(16, by=density), tile=16)


def _features(*stages: Stage) -> ha.Scatterbrain:
    return ha.Scatterbrain(*NEAR, *stages, num_features=128, spread=2.5, tile=16)


DESCENT = ha.HierarchicalSearch(
    (select.Level(32, 4, select.Representatives(1, 2)), select.Level(8, 4, select.Representatives(2, 1))), dim=4, pooled=8
)
NARROW = ha.HierarchicalSearch((select.Level(8, 4, select.Representatives(1, 2)),), pooled=5)
# the coarsest level is begun with from 128 keys on
THREE = ha.HierarchicalSearch(
    (select.Level(32, 4, select.Representatives(2, 2)), select.Level(16, 4), select.Level(4, 4)), dim=6, pooled=4
)
KEYS = ha.HierarchicalSearch((select.Level(8, 6), select.Level(1, 4)), pooled=4)
SCAN = ha.KeyScan(32, beyond=ha.HierarchicalSearch(pooled=32))
POOLED = ha.PooledChunks(CONTROL, chunk=32, num=32, averages=4, near=16, sinks=4)
MIXTURE = select.Mix((DESCENT, 2.0), (select.BlockScore(8), 1.0))

TWICE_OPENED = select.DrawAlike(24, rows=16, pooled=2, most=8, candidates=1)
OPENED = select.DrawAlike(24, rows=16, pooled=4, most=40, candidates=1)
ODD_PARTS = select.DrawAlike(24, rows=5, pooled=5, most=50, candidates=2)

USUAL = ha.Sinks(16), ha.Window(192)

# fmt: off
OURS = (
    Case("exact", ha.Exact(), exact_up_to=150),
    _alike("default", *USUAL, stage=select.DrawAlike(640, pooled=16), tile=128, num_tokens=1250, exact_up_to=640),
    # the thorough method is the default's list with more draws
    Case("scan of keys", ha.Method(ha.Sinks(16), ha.Window(128), ha.Draw(611, by=SCAN)), num_tokens=1000, exact_up_to=611),
    Case("lean", ha.lean_method(10**6), num_tokens=1250, exact_up_to=688),
    Case("control", CONTROL, exact_up_to=31),
    Case("sinks and window", ha.Method(ha.Sinks(4), ha.Window(16), tile=16)),
    Case("window and sinks", ha.Method(ha.Window(16), ha.Sinks(4), ha.Draw(16), tile=16), exact_up_to=31),
    Case("odd sizes", ha.Method(ha.Sinks(3), ha.Window(13), ha.Draw(11), tile=7), exact_up_to=21),
    Case("window of one", ha.Method(ha.Window(1), ha.Draw(24), tile=16), exact_up_to=25),
    Case("draws only", ha.Method(ha.Draw(24), tile=16), exact_up_to=24),
    Case("blocks by mean key", _ranked(ha.TopBlocks(2, block_size=8, by=select.MeanKey())), exact_up_to=31),
    Case("blocks by key bounds", _ranked(ha.TopBlocks(2, block_size=8, by=select.KeyBounds())), exact_up_to=31),
    Case("blocks by key sketch", _ranked(ha.TopBlocks(2, block_size=8, by=select.KeySketch(4))), exact_up_to=31),
    Case("blocks twice", _ranked(ha.TopBlocks(1, block_size=32), ha.TopBlocks(2, block_size=8)), exact_up_to=31),
    Case("blocks and draws", ha.Method(ha.TopBlocks(2, block_size=16), ha.Draw(16), tile=16), exact_up_to=31),
    Case("blocks larger than tiles", ha.Method(ha.TopBlocks(2, block_size=24), ha.Draw(16), tile=16), exact_up_to=40),
    Case("blocks alone", ha.Method(ha.Window(16), ha.TopBlocks(4, block_size=8), tile=16), exact_up_to=31),
    Case("hash buckets", ha.Method(ha.Sinks(4), ha.Window(16), ha.HashBuckets(16), ha.Draw(16), tile=16), exact_up_to=31),
    Case("published", ha.HyperAttention(block_size=16, sample_size=96, min_seq_len=32), exact_up_to=31),
    Case("draws by value norm", _drawn(select.ValueNorm()), exact_up_to=31),
    Case("draws by leverage", _drawn(select.LeverageScore()), exact_up_to=31),
    Case("draws by online leverage", _drawn(select.LeverageScore(online=True)), exact_up_to=31),
    Case("draws by block score", _drawn(select.BlockScore(4)), exact_up_to=31),
    Case("draws by descent", _drawn(DESCENT), exact_up_to=31),
    Case("draws by one level", _drawn(ha.HierarchicalSearch((select.Level(8, 6),), pooled=3)), exact_up_to=31),
    Case("draws by three levels", _drawn(THREE), exact_up_to=31),
    Case("draws by a level of keys", _drawn(KEYS), exact_up_to=31),
    Case("descent up to the tile", ha.Method(ha.Window(7), ha.Draw(24, by=NARROW), tile=15), exact_up_to=30),
    Case("descent into the tile", ha.Method(ha.Window(6), ha.Draw(24, by=NARROW), tile=15), exact_up_to=30),
    Case("descent without a window", ha.Method(ha.Draw(24, by=DESCENT), tile=16), exact_up_to=24),
    Case("draws by scanned keys", _drawn(ha.KeyScan(8)), exact_up_to=31),
    Case("draws by scanned keys up to a length", _drawn(ha.KeyScan(5, most=70, beyond=DESCENT)), exact_up_to=31),
    Case("scan without a window", ha.Method(ha.Draw(24, by=ha.KeyScan(16, uniform_share=0.5)), tile=16), exact_up_to=24),
    _alike("draws for alike queries", *NEAR, stage=select.DrawAlike(24, rows=8, pooled=2), tile=16, exact_up_to=31),
    _alike("alike queries, no window", stage=select.DrawAlike(32, 8, 4, uniform_share=0.2), tile=24, exact_up_to=32),
    _alike("alike queries, twice opened", *NEAR, stage=TWICE_OPENED, tile=16, exact_up_to=31),
    _alike("alike queries, opened blocks", *NEAR, stage=OPENED, tile=16, exact_up_to=31),
    _alike("opened blocks, no window", stage=select.DrawAlike(32, 8, 4, 40, 0.3, 2), tile=24, exact_up_to=32),
    _alike("alike queries, odd parts", ha.Window(7), stage=ODD_PARTS, tile=15, exact_up_to=30),
    Case("draws by several", _drawn(MIXTURE), exact_up_to=31),
    Case("pooled chunks", POOLED, exact_up_to=16),
    Case("features beside a window", ha.Scatterbrain(*NEAR, num_features=128, spread=2.5, tile=16)),
    Case("features beside blocks", _features(ha.TopBlocks(2, block_size=8)), exact_up_to=31),
    Case("features beside buckets", _features(ha.HashBuckets(16))),
    Case("blocks in panels", _ranked(ha.TopBlocks(2, 8, select.KeySketch(4), coarse=select.Coarse(2, 16))), exact_up_to=31),
)
# keys chosen as others choose them; test_rivals.py looks at these more closely
RIVALS = (
    Case("top keys", rivals.TopKeys(16), exact_up_to=16),
    Case("blocks by anti-diagonals", _after_window(rivals.AntiDiagonal(2, 8, stride=4), ha.Draw(16)), exact_up_to=31),
    Case("anti-diagonals alone", ha.Method(rivals.AntiDiagonal(3, 24, stride=8), tile=20), exact_up_to=72),
    Case("verticals and slashes", _after_window(rivals.VerticalSlash(6, 2, last=20), ha.Draw(16)), exact_up_to=31),
    Case("slashes without a window", ha.Method(ha.TopBlocks(1, 8), rivals.VerticalSlash(6, 2), tile=16), exact_up_to=8),
    Case("draws by collisions", _after_window(rivals.CollisionDraw(24, bits=2, tables=8)), exact_up_to=39),
    Case(
        "collisions beside blocks", ha.Method(ha.TopBlocks(1, 16), rivals.CollisionDraw(24, 1, 4), tile=16), exact_up_to=24
    ),
    Case("draws by budget", _after_window(ha.TopBlocks(1, 8), rivals.BudgetedDraw(24, 8, 0.3, pooled=2)), exact_up_to=39),
    Case("draws by budget alone", ha.Method(rivals.BudgetedDraw(32, 8, 0.2, 0.5), tile=16), exact_up_to=32),
    Case("draws by priority", _after_window(rivals.PriorityDraw(16, pooled=4)), exact_up_to=31),
    Case("priorities beside blocks", ha.Method(ha.TopBlocks(1, 16), rivals.PriorityDraw(24), tile=16), exact_up_to=24),
    Case("universal set", _after_window(select.UniversalSet(12), ha.Draw(16)), exact_up_to=31),
    Case("universal set alone", ha.Method(ha.TopBlocks(1, 8), select.UniversalSet(12), tile=16), exact_up_to=12),
)
# fmt: on
CASES = OURS + RIVALS
