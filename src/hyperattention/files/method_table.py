"""Methods to and from JSON: nested objects that name a type of a fixed table; no code from a file is executed."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hyperattention.files.fields import Field
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.oracle import TopKeys
from hyperattention.methods.presets import HyperAttention
from hyperattention.rivals.anti_diagonal import AntiDiagonal
from hyperattention.rivals.budgeted_draw import BudgetedDraw
from hyperattention.rivals.collision_draw import CollisionDraw
from hyperattention.rivals.priority_draw import PriorityDraw
from hyperattention.rivals.vertical_slash import VerticalSlash
from hyperattention.select.density import Density, Uniform
from hyperattention.select.draw import Draw
from hyperattention.select.locate.hash_buckets import HashBuckets
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.top_blocks import TopBlocks
from hyperattention.select.locate.universal_set import UniversalSet
from hyperattention.select.locate.window import Window
from hyperattention.select.score.block_score import BlockScore
from hyperattention.select.score.blocks import KeyBounds, KeySketch, MeanKey
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan
from hyperattention.select.score.level import Level
from hyperattention.select.score.mix import Mix
from hyperattention.select.score.pooling import Coarse
from hyperattention.select.score.representatives import Representatives
from hyperattention.select.score.value_norm import ValueNorm

# a new type needs a line here; `Method` and `Mix` take lists of parts and are handled below
_TYPES = (
    AntiDiagonal,
    BlockScore,
    BudgetedDraw,
    Coarse,
    CollisionDraw,
    HierarchicalSearch,
    Draw,
    Exact,
    HashBuckets,
    HyperAttention,
    KeyBounds,
    KeyScan,
    KeySketch,
    Level,
    MeanKey,
    Method,
    Mix,
    PriorityDraw,
    Representatives,
    Sinks,
    TopBlocks,
    TopKeys,
    Uniform,
    UniversalSet,
    ValueNorm,
    VerticalSlash,
    Window,
)
TYPES = {each.__name__: each for each in _TYPES}


def method_to_json(method: object) -> object:
    """Convert a method, or a part of one, to JSON values.

    Args:
        method: the method or part.

    Returns:
        nested objects, each with the name of its type; a part whose type is not in the table raises TypeError.

    Example:
        >>> method_to_json(Draw(688))
        {'type': 'Draw', 'num': 688, 'by': {'type': 'Uniform'}}
    """
    return part_to_json(method, TYPES)


def part_to_json(part: object, table: Mapping[str, type]) -> object:
    """Convert a part that is made of types of a table to JSON values.

    Args:
        part: a number, a text, None, a tuple of parts, or an object of one of the types.
        table: the types, by name.

    Returns:
        JSON values.

    Raises:
        TypeError: if a type is not in the table.
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, tuple):
        return [part_to_json(each, table) for each in part]
    name = type(part).__name__
    if table.get(name) is not type(part):
        raise TypeError(f"{part!r} of type {name} cannot be kept in a plan: add its type to the table")
    if type(part) is Method:
        return {"type": name, "stages": part_to_json(part.stages, table), "tile": part.tile}
    if type(part) is Mix:
        return {"type": name, "parts": part_to_json(part.parts, table)}
    return {"type": name} | {field.name: part_to_json(getattr(part, field.name), table) for field in fields(table[name])}


def method_from_json(field: Field) -> AttentionMethod:
    """Build a method from the result of `method_to_json`.

    Args:
        field: the field with the method.

    Returns:
        the method; any other value, an unknown type or a wrong argument raises ValueError.
    """
    method = part_from_json(field, TYPES)
    if not isinstance(method, AttentionMethod):
        field.refuse("it must be a method, such as Exact or Method")
    return method


def part_from_json(field: Field, table: Mapping[str, type]) -> Any:
    """Build a part from the result of `part_to_json`; an unknown type or a wrong argument raises ValueError.

    Args:
        field: the field with the part.
        table: the types that may be built, by name.

    Returns:
        the part.
    """
    if isinstance(field.value, list):
        return tuple(part_from_json(item, table) for item in field.items())
    if not isinstance(field.value, dict):
        return field.value
    name = field.part("type").text()
    if name not in table:
        field.part("type").refuse(f"it must be one of {', '.join(sorted(table))}")
    if table[name] is Method:
        given = field.known("type", "stages", "tile")
        stages = given["stages"].items()
        return _build(field, lambda: Method(*(part_from_json(each, table) for each in stages), tile=given["tile"].whole(1)))
    if table[name] is Mix:
        parts = field.known("type", "parts")["parts"].items()
        return _build(field, lambda: Mix(*(_read_pair(part, table) for part in parts)))
    return _read_dataclass(field, table[name], table)


def _read_pair(field: Field, table: Mapping[str, type]) -> tuple[Density, float]:
    pair = field.items()
    if len(pair) != 2:
        field.refuse("it must be a density and its share")
    density = part_from_json(pair[0], table)
    if not isinstance(density, Density):
        pair[0].refuse("it must be a density, such as Uniform")
    return density, pair[1].number()


def _read_dataclass(field: Field, cls: type, table: Mapping[str, type]) -> object:
    """Build a part; arguments that are not in the file take their defaults, so that a type may gain arguments."""
    known, hints = {each.name: each for each in fields(cls)}, get_type_hints(cls)
    given = {name: part for name, part in field.parts().items() if name != "type"}
    for name in given.keys() - known.keys():
        given[name].refuse(f"{cls.__name__} has no such argument")
    for name, each in known.items():
        if name not in given and each.default is MISSING and each.default_factory is MISSING:
            field.part(name)
    arguments = {name: part_from_json(part, table) for name, part in given.items()}
    for name, value in arguments.items():
        if not _fits(value, hints[name]):
            given[name].refuse(f"{cls.__name__} takes a {getattr(hints[name], '__name__', hints[name])} here")
    return _build(field, lambda: cls(**arguments))


def _fits(value: object, hint) -> bool:
    """Return whether a value has the annotated type of an argument."""
    if isinstance(hint, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, get_args(hint)[0]) for each in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _build(field: Field, make):
    """Build a part, and turn an error of its constructor into an error about the file."""
    try:
        return make()
    except (TypeError, AttributeError) as error:
        field.refuse(str(error))
    except ValueError as error:
        # the error of an inner part already names its field
        if str(error).startswith(f"{field.file}: "):
            raise
        field.refuse(str(error))
