"""The methods that a calibration chooses from."""

from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.default import default_method, lean_method, thorough_method
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.select.density import Uniform
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan

# any length beyond the crossover gives the same default
_LONG = 10**9
# a length at which the lean method searches as it does on most texts
_SEARCHED = 65_536
_SINKS = Sinks(16)
_WINDOWS = (64, 256, 1024)
_UNIFORM_DRAWS = (128, 512)
_NARROW_DRAWS = (64, 128, 256, 448)
_WIDE_DRAWS = (256, 1024, 1536, 3072)
_ALIKE_DRAWS = (112, 224, 448)
_SCANNED_DRAWS = (64, 128, 256, 448, 688, 1024, 2048)
# steps of about a half: a budget is spent to within a few per cent even on a model of eight kv heads
_COARSE_DRAWS = (32, 64, 112, 160, 224, 320, 448, 640)
_FINE_DRAWS = (224, 320, 448, 640, 880, 1216, 1680)


def candidates(length: int) -> tuple[AttentionMethod, ...]:
    """List the candidate methods at a length: those that list fewer pairs than exact attention.

    Sinks and a window alone are enough for heads that attend only to these keys. Uniform draws need no search. Draws by
    `HierarchicalSearch`, and by the slower `KeyScan`, find far keys; `DrawAlike` finds most of them, at more
    time. Exact attention is for heads that no other method
    can approximate. The methods are grouped by family, not by increasing cost; of two methods with about the same time and
    the same number of pairs, the earlier one is chosen.

    Args:
        length: tokens of the calibration texts.

    Returns:
        methods, exact attention first.
    """
    windows = (Method(_SINKS, Window(size)) for size in _WINDOWS)
    uniform = (Method(_SINKS, Window(64), Draw(num, by=Uniform())) for num in _UNIFORM_DRAWS)
    narrow = (Method(_SINKS, Window(64), Draw(num, by=HierarchicalSearch())) for num in _NARROW_DRAWS)
    wide = (Method(_SINKS, Window(256), Draw(num, by=HierarchicalSearch())) for num in _WIDE_DRAWS)
    scanned = (Method(_SINKS, Window(64), Draw(num, by=KeyScan(32))) for num in _SCANNED_DRAWS)
    alike = (Method(_SINKS, Window(64), DrawAlike(num), tile=64) for num in _ALIKE_DRAWS)
    lean, usual, thorough = lean_method(_SEARCHED), default_method(_LONG), thorough_method(_LONG)
    ladder = (*windows, *uniform, *narrow, *wide, *scanned, lean, *alike, usual, thorough)
    return Exact(), *dict.fromkeys(method for method in ladder if method.cost(length).share_of_exact < 1)


def candidates_by_pairs(length: int) -> tuple[AttentionMethod, ...]:
    """List the candidate methods of a plan for a number of pairs: those of least error for their pairs.

    Sinks and a window alone, draws for lists of 64 alike queries, and draws for lists of 16, whose errors are several times
    smaller at the same pairs, and which take two to three times as long: the few draws of heads that hardly matter are for
    64. Windows and tiles are narrow, because each key of them is a pair of every query.

    Args:
        length: tokens of the calibration texts.

    Returns:
        methods, exact attention first.
    """
    windows = (Method(_SINKS, Window(size)) for size in (64, 256, 1024))
    coarse = (Method(_SINKS, Window(64), DrawAlike(num)) for num in _COARSE_DRAWS)
    fine = (Method(_SINKS, Window(64), DrawAlike(num, rows=16)) for num in _FINE_DRAWS)
    return Exact(), *(method for method in (*windows, *coarse, *fine) if method.cost(length).share_of_exact < 1)
