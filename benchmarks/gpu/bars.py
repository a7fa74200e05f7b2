"""What is promised of attention on a GPU, and what the records say came of it: no number is typed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Records = Sequence[Mapping]
LONG, LONGEST = 131072, 2**20
NO_GPU = "not measured: no GPU yet"


@dataclass(frozen=True)
class Bar:
    """One figure that is promised, and what came of it."""

    figure: str
    bar: str
    shown: str
    beside: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "**missed**"


@dataclass(frozen=True)
class Speed:
    """A bar on how many times faster than the fastest exact kernel a task is."""

    figure: str
    least: float
    part: str
    keys: int
    causal: bool = True


SPEEDS = (
    Speed("causal forward, 131,072 tokens, vs the fastest exact", 25, "forward", LONG),
    Speed("non-causal forward, 131,072 tokens, vs the fastest exact", 60, "forward", LONG, causal=False),
    Speed("causal forward, 1,048,576 tokens, vs the fastest exact", 150, "long", LONGEST),
    Speed("causal forward + backward, 131,072 tokens, vs the fastest exact", 12, "backward", LONG),
)


def find(records: Records, part: str, inputs: str = "structured", **shape: object) -> Mapping | None:
    """The last comparison of a part on such inputs, toys aside."""
    for record in reversed(records):
        asked = record.get("part") == part and record.get("inputs") == inputs and not record.get("toy")
        if asked and all(record["shape"].get(key) == value for key, value in shape.items()):
            return record
    return None


def candidate(record: Mapping | None, name: str) -> Mapping | None:
    """A candidate of a comparison, if it ran."""
    found = () if record is None else record["contenders"]
    return next((each for each in found if each["name"] == name and not each.get("failed")), None)


def ours_of(record: Mapping | None) -> Mapping | None:
    """The method judged, if it really approximated."""
    ours = candidate(record, "ours")
    return ours if ours and ours["approximated"] else None


def error_text(line: Mapping | None) -> str:
    if line is None or not line.get("error"):
        return "-"
    error = line["error"]
    if error["low"] == error["high"]:
        return f"{error['mean']:.3g}"
    return f"{error['mean']:.3g} [{error['low']:.3g}, {error['high']:.3g}]"


def beside_text(record: Mapping | None) -> str:
    """Errors of the method judged, its control and exact attention in its own precision."""
    ours = candidate(record, "ours")
    parts = [f"{ours['label']}: error {error_text(ours)}" if ours else "error -"]
    if control := candidate(record, "control"):
        times = f", {control['speedup']['value']:.3g}x" if control.get("speedup") else ""
        parts.append(f"control, same slots: {error_text(control)}{times}")
    if record and (exact := candidate(record, record["reference"])):
        parts.append(f"exact itself: {error_text(exact)}")
    return "; ".join(parts)


def unmeasured(records: Records, part: str, figure: str, bar: str) -> Bar:
    """Say why a figure is missing, as far as the records tell."""
    whys = [record.get("skipped") or record.get("failed") for record in records if record.get("part") == part]
    why = next((each for each in reversed(whys) if each), None)
    return Bar(figure, bar, f"not measured: {why}" if why else NO_GPU if not records else "not measured", "", None)


def speed_bar(records: Records, speed: Speed) -> Bar:
    bar = f">= {speed.least:g}x"
    record = find(records, speed.part, keys=speed.keys, causal=speed.causal)
    if ours_of(record) is None or not record["ratio"]:
        return unmeasured(records, speed.part, speed.figure, bar)
    beside = beside_text(record)
    gaussian = find(records, speed.part, "gaussian", keys=speed.keys, causal=speed.causal)
    if ours_of(gaussian) and gaussian["ratio"]:
        beside += f"; Gaussian inputs: {gaussian['ratio']['value']:.3g}x, {beside_text(gaussian)}"
    if note := record.get("heads_note"):
        beside += f"; {note}"
    value = record["ratio"]["value"]
    return Bar(speed.figure, bar, f"{value:.4g}x", beside, value >= speed.least)


def crossover_bar(records: Records) -> Bar:
    """The shortest length from which on every length measured was faster than exact attention."""
    figure, bar = "crossover with the fastest exact, causal forward", "<= 8,192 tokens"
    lengths = {
        record["shape"]["keys"]: record
        for record in records
        if record.get("part") in ("crossover", "forward") and record.get("inputs") == "structured" and not record.get("toy")
        if record["shape"]["causal"] and record["ratio"]
    }
    if not any(record["part"] == "crossover" for record in lengths.values()):
        return unmeasured(records, "crossover", figure, bar)
    first = None
    for keys in sorted(lengths, reverse=True):
        if not ours_of(lengths[keys]) or lengths[keys]["ratio"]["value"] <= 1:
            break
        first = keys
    if first is None:
        return Bar(figure, bar, "none found", beside_text(lengths[max(lengths)]), False)
    beside = f"{lengths[first]['ratio']['value']:.3g}x there; {beside_text(lengths[first])}"
    return Bar(figure, bar, f"{first:,} tokens", beside, first <= 8192)


def floor_bar(records: Records) -> Bar:
    figure, bar = "time over the roofline's floor, causal forward, 131,072 tokens", "<= 3x"
    record = find(records, "forward", keys=LONG, causal=True)
    ours = ours_of(record)
    if ours is None or not ours["over_floor"]:
        return unmeasured(records, "forward", figure, bar)
    exact = candidate(record, record["reference"])
    beside = f"floor {1000 * ours['floor_s']:.3g} ms; {beside_text(record)}"
    beside += f"; exact over its own floor: {exact['over_floor']:.3g}x" if exact and exact["over_floor"] else ""
    return Bar(figure, bar, f"{ours['over_floor']:.4g}x", beside, ours["over_floor"] <= 3)


def peer_bar(records: Records) -> Bar:
    """Against the faster of the published paths in time, and the more accurate one in error."""
    figure, bar = "vs published HyperAttention's code, causal forward, 131,072 tokens", ">= 4x at no larger error"
    record = find(records, "peer", keys=LONG)
    ours = ours_of(record)
    peers = [each for name in ("peer_flash", "peer_masked") if (each := candidate(record, name))]
    if ours is None or not ours["error"] or not peers or not all(each["error"] for each in peers):
        failed = [each["failed"] for each in (record or {}).get("contenders", ()) if each.get("failed")]
        found = unmeasured(records, "peer", figure, bar)
        return Bar(figure, bar, f"not measured: {failed[0]}", "", None) if failed else found
    value = min(each["median_s"] for each in peers) / ours["median_s"]
    met = value >= 4 and ours["error"]["mean"] <= min(each["error"]["mean"] for each in peers)
    beside = "; ".join([beside_text(record), *(f"{each['label']}: {error_text(each)}" for each in peers)])
    return Bar(figure, bar, f"{value:.4g}x", beside, met)


def share_bar(records: Records, part: str, figure: str, most: float) -> Bar:
    bar = f"<= {most:g} % of the call"
    record = find(records, part, keys=LONG)
    if ours_of(record) is None or record["share"] is None:
        return unmeasured(records, part, figure, bar)
    percent = 100 * record["share"]
    beside = f"call {1000 * candidate(record, 'ours')['median_s']:.3g} ms; {beside_text(record)}"
    return Bar(figure, bar, f"{percent:.4g} %", beside, percent <= most)


def bars(records: Records) -> list[Bar]:
    """Every bar, measured or not."""
    return [
        *(speed_bar(records, speed) for speed in SPEEDS),
        crossover_bar(records),
        floor_bar(records),
        peer_bar(records),
        share_bar(records, "audit", "audit of 64 rows a head (error and interval), 131,072 tokens", 5),
        share_bar(records, "selection", "selection alone, causal forward, 131,072 tokens", 35),
    ]
