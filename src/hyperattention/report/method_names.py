"""Short names of methods, for tables and maps."""

from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window


def short_name(method: AttentionMethod) -> str:
    """Return a short name of a method, for tables and maps.

    Args:
        method: the method.

    Returns:
        a name such as ``sinks 16 + window 256 + 688 by HierarchicalSearch``; other stages are shown by their repr.
    """
    if isinstance(method, Exact):
        return "exact"
    if not isinstance(method, Method):
        return type(method).__name__
    return " + ".join(map(_stage_name, method.stages))


def _stage_name(stage: object) -> str:
    match stage:
        case Sinks(num=num):
            return f"sinks {num:,}"
        case Window(size=size):
            return f"window {size:,}"
        case Draw(num=num, by=by):
            return f"{num:,} by {type(by).__name__}"
        case DrawAlike(num=num, rows=rows):
            return f"{num:,} for {rows} alike"
    return repr(stage)
