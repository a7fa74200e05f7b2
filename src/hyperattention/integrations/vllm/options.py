"""The options of a server: what a user writes in ``--additional-config '{"hyperattention": {...}}'``."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hyperattention.files.fields import Field
from hyperattention.files.method_table import method_from_json
from hyperattention.integrations.vllm.decode_options import DecodeOptions, read_decode
from hyperattention.methods.base import AttentionMethod
from hyperattention.random import SEED_LIMIT

KEY = "hyperattention"
NAMES = ("default", "thorough", "lean")
_REMEDY = "correct --additional-config (docs/vllm.md lists the options)"


@dataclass(frozen=True)
class Options:
    """The options of a server, checked.

    Args:
        method: name of a preset, or a method; ignored with a plan.
        plan: file of a plan, which has a method for each layer and head.
        layers: layers to approximate; None for all, or all of the plan's.
        min_length: position from which on the queries of a prompt are approximated; None for where the method begins to
            be faster than exact attention.
        seed: seed of every draw. It does not depend on the request, the batch or the process.
        audit_every: compare every so many approximated calls with exact rows; 0 for never.
        audit_rows: rows of each audited call.
        decode: how tokens are generated; None for exact attention.
    """

    method: str | AttentionMethod = "default"
    plan: Path | None = None
    layers: frozenset[int] | None = None
    min_length: int | None = None
    seed: int = 0
    audit_every: int = 0
    audit_rows: int = 64
    decode: DecodeOptions | None = None


def read_options(additional_config: Any) -> Options:
    """Read the options out of vLLM's additional configuration.

    Args:
        additional_config: the configuration; without our key, all options have their defaults.

    Returns:
        the options; an unknown key or a wrong value raises a ValueError that names the key, the rule and the remedy. So
        do options outside our key, and a key much like ours.
    """
    given = additional_config if isinstance(additional_config, Mapping) else {}
    known = [each.name for each in fields(Options)]
    if KEY not in given:
        _refuse_misplaced(Field(dict(given), "--additional-config", "", _REMEDY), known)
    found = Field(given.get(KEY, {}), "--additional-config", KEY, _REMEDY).parts()
    for name in found:
        if name not in known:
            found[name].refuse(f"no such option is known, only {', '.join(known)}")
    if "plan" in found and "method" in found:
        found["method"].refuse("a plan has its own methods: give either `method` or `plan`")
    readers = {
        "method": _read_method,
        "plan": lambda field: Path(field.text()),
        "layers": lambda field: frozenset(each.whole() for each in field.items()),
        "min_length": lambda field: field.whole(),
        "seed": lambda field: field.whole(0, SEED_LIMIT - 1),
        "audit_every": lambda field: field.whole(),
        "audit_rows": lambda field: field.whole(1),
        "decode": read_decode,
    }
    return Options(**{name: readers[name](field) for name, field in found.items()})


def _refuse_misplaced(whole: Field, known: list[str]) -> None:
    """Refuse options that would not be read; other keys belong to other plugins."""
    found = whole.parts()
    alike = get_close_matches(KEY, [name.lower() for name in found], n=1, cutoff=0.8)
    if alike or (found and found.keys() <= set(known)):
        whole.refuse(f'options are read from the key {KEY!r} alone: write {{"{KEY}": {{...}}}}')


def _read_method(field: Field) -> str | AttentionMethod:
    if isinstance(field.value, Mapping):
        return method_from_json(field)
    if not isinstance(field.value, str) or field.value not in NAMES:
        field.refuse(f"it must be one of {', '.join(NAMES)}, or a method as in a plan file")
    return field.value
