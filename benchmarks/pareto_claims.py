"""What is claimed of the comparison over budgets, computed from its records alone."""

from collections.abc import Mapping, Sequence

from claims import Record, figure

from hyperattention.bench.front import error_at

# families that are this project's, and whose points are compared with all others
OURS = ("scan_64", "scan_16", "default", "lean")
EQUAL_PAIRS, TIME_ALLOWED = 0.6, 1.25
EQUAL_TIME = 0.7


def over(mine: float, theirs: float) -> float:
    return mine / theirs if theirs > 0 else float("inf")


def equal_pairs(points: Sequence[Mapping], where: str) -> Record:
    """Our error over the control's at the same keys a query: the best budget among those that keep to the time allowed."""
    controls = {each["slots"]: each for each in points if each["family"] == "control"}
    found = []
    for ours in (each for each in points if each["family"] in OURS):
        control = controls[ours["slots"]]
        mine, theirs = ours["error"], control["error"]
        ratio, time = over(mine["mean"], theirs["mean"]), ours["median_s"] / control["median_s"]
        found.append((ratio, time, ours["slots"], ours["family"]))
    allowed = [each for each in found if each[1] <= TIME_ALLOWED]
    ratio, time, slots, family = min(allowed or found)
    beside = "; ".join(f"{name} {r:.2f}x at {t:.2f}x the time" for r, t, n, name in found if n == slots)
    return figure(
        f"error on {where}, vs the control at equal pairs, best budget within {TIME_ALLOWED:g}x its time",
        f"<= {EQUAL_PAIRS:g}x",
        ratio,
        bool(allowed) and ratio <= EQUAL_PAIRS,
        f"{ratio:.3g}x ({family}, {slots:,} keys, {time:.2f}x the time)",
        beside,
    )


def curves_of(points: Sequence[Mapping]) -> dict[str, list[tuple[float, float]]]:
    """Time and error of every other method over its budgets; exact attention and the oracle are no rivals."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for each in points:
        # the published algorithm is exact up to a length of its own
        rival = each["family"] not in OURS and not each["exact"] and not each["oracle"]
        if rival and each.get("approximated", True):
            curves.setdefault(each["title"], []).append((each["median_s"], each["error"]["mean"]))
    return curves


def best_at(seconds: float, points: Sequence[Mapping]) -> tuple[float, str]:
    """The least error that another method reaches in a time, and which; the fastest one's where none is as fast."""
    curves = curves_of(points)
    reached = ((error_at(seconds, curve), title) for title, curve in curves.items())
    known = [(error, title) for error, title in reached if error is not None]
    fastest = min((*spot, title) for title, curve in curves.items() for spot in curve)
    return min(known, default=fastest[1:])


def equal_time(points: Sequence[Mapping], where: str, slots: int) -> Record:
    """Our best error at a budget over the least that any other method reaches in our time; all of ours beside."""
    found = []
    for ours in (each for each in points if each["family"] in OURS):
        (least, title), mine = best_at(ours["median_s"], points), ours["error"]
        found.append((over(mine["mean"], least), ours["slots"], ours["family"], title))
    ratio, _, family, title = min(each for each in found if each[1] == slots)
    claim = f"error on {where}, {slots:,} keys a query, vs the best other method at equal time"
    beside = "; ".join(f"{name} {r:.2f}x of {other}" for r, n, name, other in found if n == slots)
    return figure(claim, f"<= {EQUAL_TIME:g}x", ratio, ratio <= EQUAL_TIME, f"{ratio:.3g}x ({family}; {title})", beside)
