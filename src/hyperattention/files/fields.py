"""Read fields of a JSON file, and say which file, which field and what to do where one is wrong."""

import sys
from dataclasses import dataclass
from typing import Never


@dataclass(frozen=True)
class Field:
    """A value found in a file, and where it was found.

    Args:
        value: what JSON made of it.
        file: the file, for messages.
        name: the path of the field within the file, such as ``layers.3``; empty for the whole.
        remedy: what a user can do about a wrong value.
    """

    value: object
    file: str
    name: str
    remedy: str

    def refuse(self, rule: str) -> Never:
        """Say what is wrong.

        Args:
            rule: what the value should be.

        Raises:
            ValueError: always.
        """
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        where = f"{self.name} is {shown}" if self.name else f"it holds {shown}"
        raise ValueError(f"{self.file}: {where}: {rule}; {self.remedy}")

    def part(self, name: str) -> "Field":
        """Find a field of an object.

        Args:
            name: its name.

        Returns:
            the field.

        Raises:
            ValueError: if it is missing.
        """
        found = self.parts()
        if name not in found:
            raise ValueError(
                f"{self.file}: {self._path(name)} is missing: the file is cut short, or of another kind; {self.remedy}"
            )
        return found[name]

    def parts(self) -> "dict[str, Field]":
        """List the fields of an object; anything else is refused."""
        if not isinstance(self.value, dict):
            self.refuse("it must be an object")
        return {str(name): self._at(str(name), value) for name, value in self.value.items()}

    def items(self) -> "list[Field]":
        """List the entries of a list; anything else is refused."""
        if not isinstance(self.value, list):
            self.refuse("it must be a list")
        return [self._at(str(number), value) for number, value in enumerate(self.value)]

    def known(self, *names: str) -> "dict[str, Field]":
        """Find exactly these fields.

        Args:
            *names: their names.

        Returns:
            the fields; missing and unknown ones are refused.
        """
        found = self.parts()
        for name in found.keys() - set(names):
            found[name].refuse("no such field is known")
        return {name: self.part(name) for name in names}

    def whole(self, least: int = 0, most: int | None = None) -> int:
        """Read a whole number.

        Args:
            least: the smallest allowed.
            most: the largest allowed; None for any.

        Returns:
            the number.
        """
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
            self.refuse(f"it must be a whole number from {least}" + (" on" if most is None else f" to {most}"))
        return value

    def number(self, least: float = 0.0) -> float:
        """Read a finite number.

        Args:
            least: the smallest allowed.

        Returns:
            the number.
        """
        value = self.value
        # the comparisons refuse NaN too
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= sys.float_info.max:
            self.refuse(f"it must be a finite number of at least {least:g}")
        return float(value)

    def text(self) -> str:
        """Read a text."""
        if not isinstance(self.value, str):
            self.refuse("it must be a text")
        return self.value

    def _path(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def _at(self, name: str, value: object) -> "Field":
        return Field(value, self.file, self._path(name), self.remedy)
