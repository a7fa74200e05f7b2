"""Read fields of a JSON file; an error names the file, the field and the remedy."""

import sys
from dataclasses import dataclass
from typing import Never


@dataclass(frozen=True)
class Field:
    """A value from a file, and its place in the file.

    Args:
        value: the value, as parsed from JSON.
        file: the file, for messages.
        name: the path of the field within the file, such as ``layers.3``; empty for the top level.
        remedy: advice for the user about a wrong value.
    """

    value: object
    file: str
    name: str
    remedy: str

    def refuse(self, rule: str) -> Never:
        """Raise an error about this value.

        Args:
            rule: the rule for the value.

        Raises:
            ValueError: always.
        """
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        where = f"{self.name} is {shown}" if self.name else f"it holds {shown}"
        raise ValueError(f"{self.file}: {where}: {rule}; {self.remedy}")

    def part(self, name: str) -> "Field":
        """Return a field of an object.

        Args:
            name: name of the field.

        Returns:
            the field.

        Raises:
            ValueError: if the field is missing.
        """
        found = self.parts()
        if name not in found:
            raise ValueError(
                f"{self.file}: {self._path(name)} is missing: the file is incomplete, or of another kind; {self.remedy}"
            )
        return found[name]

    def parts(self) -> "dict[str, Field]":
        """Return the fields of an object; any other value raises an error."""
        if not isinstance(self.value, dict):
            self.refuse("it must be an object")
        return {str(name): self._at(str(name), value) for name, value in self.value.items()}

    def items(self) -> "list[Field]":
        """Return the entries of a list; any other value raises an error."""
        if not isinstance(self.value, list):
            self.refuse("it must be a list")
        return [self._at(str(number), value) for number, value in enumerate(self.value)]

    def known(self, *names: str) -> "dict[str, Field]":
        """Return exactly these fields.

        Args:
            *names: names of the fields.

        Returns:
            the fields; missing and unknown fields raise an error.
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
