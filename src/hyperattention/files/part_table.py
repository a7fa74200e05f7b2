"""Methods and policies as JSON and back: nested objects that name a type of a fixed table; nothing is ever evaluated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from inspect import Parameter, signature
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hyperattention.files.fields import Field


@dataclass(frozen=True)
class PartTable:
    """The types that may be written and read, all of them dataclasses.

    Args:
        types: the types.
        spread: for types that take some arguments by place, the name of the field that holds them, by name of the type.
    """

    types: tuple[type, ...]
    spread: Mapping[str, str] = field(default_factory=dict)
    by_name: dict[str, type] = field(init=False)
    # looked up once: a compiler that traces cannot ask for the fields of a class
    arguments: dict[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {each.__name__: each for each in self.types})
        names = {each.__name__: tuple(part.name for part in fields(each)) for each in self.types}
        object.__setattr__(self, "arguments", names)

    def knows(self, part: object) -> bool:
        """Return whether a part can be written.

        Args:
            part: a number, a text, None, a tuple of parts, or an object.

        Returns:
            whether all its types are in the table.
        """
        if part is None or isinstance(part, (bool, int, float, str)):
            return True
        if isinstance(part, tuple):
            return all(self.knows(each) for each in part)
        name = type(part).__name__
        return self.by_name.get(name) is type(part) and all(self.knows(getattr(part, each)) for each in self.arguments[name])

    def write(self, part: object) -> object:
        """Write a part, by means that a compiler can trace.

        Args:
            part: a number, a text, None, a tuple of parts, or an object of one of the types.

        Returns:
            what JSON can hold: nested objects, each with the name of its type.

        Raises:
            TypeError: if a type is not in the table.
        """
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        if isinstance(part, tuple):
            return [self.write(each) for each in part]
        name = type(part).__name__
        if self.by_name.get(name) is not type(part):
            raise TypeError(f"{part!r} of type {name} cannot be kept in a file: add its type to the table")
        return {"type": name} | {each: self.write(getattr(part, each)) for each in self.arguments[name]}

    def read(self, found: Field) -> Any:
        """Build what `write` wrote; an unknown type or a wrong argument is refused with a ValueError.

        Arguments that the file leaves out take their defaults, so that a type may gain some.

        Args:
            found: where it stands.

        Returns:
            the part.
        """
        if isinstance(found.value, list):
            return tuple(self.read(item) for item in found.items())
        if not isinstance(found.value, dict):
            return found.value
        name = found.part("type").text()
        if name not in self.by_name:
            found.part("type").refuse(f"it must be one of {', '.join(sorted(self.by_name))}")
        cls, hints = self.by_name[name], get_type_hints(self.by_name[name])
        given = _given(found, cls)
        arguments = {each: self.read(part) for each, part in given.items()}
        for each, value in arguments.items():
            if not _fits(value, hints[each]):
                given[each].refuse(f"{name} takes a {_say(hints[each])} here")
        by_place = arguments.pop(self.spread[name]) if name in self.spread else ()
        return _build(found, lambda: cls(*by_place, **arguments))


def _given(found: Field, cls: type) -> dict[str, Field]:
    """List the arguments that a file gives; unknown ones, and missing ones without a default, are refused."""
    # a dataclass may have a constructor of its own, whose defaults its fields do not know
    known = signature(cls).parameters
    given = {name: part for name, part in found.parts().items() if name != "type"}
    for name in given.keys() - known.keys():
        given[name].refuse(f"{cls.__name__} has no such argument")
    for name, each in known.items():
        if name not in given and each.default is Parameter.empty:
            found.part(name)
    return given


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value is of the type that an argument is annotated with."""
    if isinstance(hint, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        first, *others = get_args(hint)
        wanted = [first] * len(value) if others == [...] else [first, *others]
        return len(value) == len(wanted) and all(map(_fits, value, wanted))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _say(hint: Any) -> str:
    """Name a type as a user knows it: tuples by what they hold."""
    if get_origin(hint) is tuple:
        return f"list of {' and '.join(_say(each) for each in get_args(hint) if each is not ...)}"
    return getattr(hint, "__name__", str(hint))


def _build(found: Field, make: Callable[[], object]) -> object:
    """Make a part, and turn what its constructor objects to into an error of the file."""
    try:
        return make()
    except (TypeError, AttributeError) as error:
        found.refuse(str(error))
    except ValueError as error:
        # an inner part has already said which field it is
        if str(error).startswith(f"{found.file}: "):
            raise
        found.refuse(str(error))
