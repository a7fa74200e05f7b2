"""The file of a plan: JSON with a version; every field is checked when the file is read."""

import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from hyperattention.files.atomic_write import atomic_write
from hyperattention.files.fields import Field
from hyperattention.files.fingerprint import Fingerprint
from hyperattention.files.method_table import method_from_json, method_to_json
from hyperattention.files.outputs import refuse_existing
from hyperattention.files.plan import Measured, Plan
from hyperattention.files.timed import Timed
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_head import ByHead

FORMAT, VERSION = "hyperattention plan", 1
_REMEDY = "run `hyperattention calibrate` again"


def save_plan(plan: Plan, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a plan to a file, completely or not at all.

    Args:
        plan: the plan.
        path: the file.
        overwrite: whether an existing file may be replaced; if not, an existing file raises FileExistsError.
    """
    if not overwrite:
        refuse_existing(Path(path), "overwrite=True")
    atomic_write(Path(path), json.dumps(_to_json(plan), indent=1) + "\n")


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a file, and check every field.

    Args:
        path: the file.

    Returns:
        the plan.

    Raises:
        ValueError: if the file is not a complete plan of this version; the message names file, field and remedy.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the plan {path}: {error.strerror}; name a file that `calibrate` wrote") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the plan {path}: {error}; name a file that `calibrate` wrote") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a complete JSON file ({error}), or not a plan; {_REMEDY}") from error
    return _read_plan(Field(data, str(path), "", _REMEDY))


def _to_json(plan: Plan) -> dict[str, object]:
    methods = list(dict.fromkeys(method for layer in plan.layers.values() for method in layer.methods))
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(plan.model),
        "tolerance": plan.tolerance,
        "crossover": plan.crossover,
        "methods": [method_to_json(method) for method in methods],
        "layers": {
            str(layer): {"methods": [methods.index(each) for each in served.methods], "errors": list(plan.errors[layer])}
            for layer, served in plan.layers.items()
        },
        "measured": asdict(plan.measured),
    }


def _read_plan(whole: Field) -> Plan:
    if whole.part("format").text() != FORMAT:
        whole.part("format").refuse(f"it must be {FORMAT!r}")
    if whole.part("version").whole() != VERSION:
        whole.part("version").refuse(f"this release reads version {VERSION}")
    names = ("format", "version", "model", "tolerance", "crossover", "methods", "layers", "measured")
    given = whole.known(*names)
    model = read_fingerprint(given["model"])
    methods = [method_from_json(method) for method in given["methods"].items()]
    layers, errors = {}, {}
    for name, layer in given["layers"].parts().items():
        number = int(name) if name.isdecimal() and str(int(name)) == name else name
        index = replace(layer, value=number).whole(0, model.num_layers - 1)
        layers[index], errors[index] = _read_layer(layer, methods, model.num_kv_heads)
    if not layers:
        given["layers"].refuse("it must name at least one layer")
    # null if the plan was not faster at the calibration length
    crossover = None if given["crossover"].value is None else given["crossover"].whole()
    return Plan(model, layers, errors, given["tolerance"].number(), crossover, _read_measured(given["measured"]))


def _read_layer(layer: Field, methods: list[AttentionMethod], num_kv_heads: int) -> tuple[ByHead, tuple[float, ...]]:
    given = layer.known("methods", "errors")
    chosen = [methods[each.whole(0, len(methods) - 1)] for each in given["methods"].items()]
    errors = tuple(each.number() for each in given["errors"].items())
    # if a configuration does not give one number of heads, the two lists must still have equal length
    wanted = num_kv_heads or max(1, len(chosen))
    for name, entries in (("methods", chosen), ("errors", errors)):
        if len(entries) != wanted:
            given[name].refuse(f"it must have {wanted} entries, one for each kv head")
    return ByHead(tuple(chosen)), errors


def read_fingerprint(field: Field) -> Fingerprint:
    """Read the fingerprint of a model.

    Args:
        field: the field with the fingerprint.

    Returns:
        the fingerprint; missing, unknown and wrong fields raise an error.
    """
    given = field.known(*(each.name for each in fields(Fingerprint)))
    num_heads, num_kv_heads, head_dim = (given[name].whole() for name in ("num_heads", "num_kv_heads", "head_dim"))
    return Fingerprint(
        given["model_class"].text(), given["num_layers"].whole(1), num_heads, num_kv_heads, head_dim, given["weights"].text()
    )


def _read_measured(field: Field) -> Measured:
    # plans of earlier releases have no times by length
    names = {each.name for each in fields(Measured)} - ({"times"} - field.parts().keys())
    given = field.known(*names)
    length, documents, seed, threads = (given[name].whole() for name in ("length", "documents", "seed", "threads"))
    names = ("pairs_per_query", "exact_pairs_per_query", "seconds", "exact_seconds")
    pairs, exact_pairs, seconds, exact_seconds = (given[name].number() for name in names)
    return Measured(
        length=length,
        documents=documents,
        text=given["text"].text(),
        seed=seed,
        device=given["device"].text(),
        threads=threads,
        versions={name: part.text() for name, part in given["versions"].parts().items()},
        pairs_per_query=pairs,
        exact_pairs_per_query=exact_pairs,
        seconds=seconds,
        exact_seconds=exact_seconds,
        # the loss may decrease by chance on a short text
        added_nats=given["added_nats"].number(-sys.float_info.max),
        times=_read_times(given["times"]) if "times" in given else (),
    )


def _read_times(field: Field) -> tuple[Timed, ...]:
    found = []
    for entry in field.items():
        given = entry.known(*(each.name for each in fields(Timed)))
        # times are divisors, so they must not be 0
        seconds = (given[name].number(sys.float_info.min) for name in ("plan", "exact", "lowest", "highest"))
        found.append(Timed(given["length"].whole(1), *seconds))
    if [each.length for each in found] != sorted({each.length for each in found}):
        field.refuse("lengths must rise")
    return tuple(found)
