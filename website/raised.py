"""Every error and warning of the package, read from its source: the text, with gaps for values, and its remedy."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "hyperattention"
# exceptions that speak to a user; others steer the program (StopIteration, typer.Exit)
ERRORS = frozenset(
    {
        "FileExistsError", "FileNotFoundError", "ModuleNotFoundError", "NotImplementedError", "OSError", "RuntimeError",
        "SystemExit", "TypeError", "ValueError",
    }
)  # fmt: skip
# functions that show their first argument to a user: the command line's, and Python's warnings
SPEAKERS = {"refuse": "command line", "warnings.warn": "warning"}
# what stands for a value of the call
GAP = "…"
# a clause that begins with one of these, or holds one of the second kind, tells what to do
VERBS = frozenset(
    """
    absorb add allow append ask attend calibrate call check choose clear close compare convert cut delete detach
    divide end evaluate expand fold give install keep leave let list load make move multiply name order pad pass pip
    prepare put read reinstall remove restore run save see set shorten start take train transpose unset
    use wait write
    """.split()  # noqa: SIM905 - a list of so many words would take as many lines
)
RULES = re.compile(r"\b(must|needs?|use|give)\b")
# a rule that stands at once behind the name of an argument
BARE_RULE = re.compile(r"(?: and)? (?=(?:must|needs?|takes) )")


@dataclass(frozen=True)
class Message:
    """One message: its text with gaps, the exception, and the module that raises it."""

    text: str
    error: str
    module: str

    @property
    def parts(self) -> tuple[str, str]:
        """Cut the text before the clause that tells what to do; the second part is empty if none does."""
        for cut in re.finditer(r"[:;.,] (?:so )?", self.text):
            rest = self.text[cut.end() :]
            if rest.split(" ", 1)[0].strip("`").lower() in VERBS:
                return self.text[: cut.start()], rest
        for cut in re.finditer(r"[:;] ", self.text):
            if RULES.search(self.text[cut.end() :]):
                return self.text[: cut.start()], self.text[cut.end() :]
        bare = BARE_RULE.search(self.text)
        return (self.text[: bare.start()], self.text[bare.end() :]) if bare else (self.text, "")

    @property
    def group(self) -> int:
        """0 if the text begins with a name, 1 for a word, 2 for a value."""
        if self.text.startswith(GAP):
            return 2
        return 0 if re.match(r"[\w.]+[=(]", self.text) else 1

    @property
    def key(self) -> tuple[int, str]:
        """The order on the page: by the first fixed words."""
        return self.group, re.sub(rf"^[{GAP}\W]+", "", self.text).lower()


def messages() -> list[Message]:
    """Read all messages of the package, each once."""
    found = {
        message
        for path in sorted(PACKAGE.rglob("*.py"))
        for message in _in_module(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).as_posix())
    }
    return sorted(found, key=lambda each: (each.key, each.module))


def _in_module(tree: ast.Module, module: str) -> Iterator[Message]:
    for node, kind, scope in _places(tree, "", tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in ERRORS:
            call, error = node.exc, ast.unparse(node.exc.func)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in SPEAKERS:
            call, error = node, SPEAKERS[ast.unparse(node.func)]
        else:
            continue
        text = _Place(kind, scope, tree).text(call.args[0]) if call.args else ""
        text = re.sub(rf"{GAP}(,? ?{GAP})+", GAP, re.sub(r"\s+", " ", text))
        # an error that is passed on has no text of its own
        if re.search(r"\w", text):
            yield Message(text, error, module)


def _places(node: ast.AST, kind: str, scope: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Walk through nodes, each with the class and the function around it."""
    yield node, kind, scope
    inner_kind = node.name if isinstance(node, ast.ClassDef) else kind
    inner = node if isinstance(node, ast.FunctionDef) else scope
    for child in ast.iter_child_nodes(node):
        yield from _places(child, inner_kind, inner)


@dataclass(frozen=True)
class _Place:
    """Where a message is put together: its class, its function and its module."""

    kind: str
    scope: ast.AST
    module: ast.Module

    def text(self, node: ast.expr) -> str:
        """Write an expression as text, with gaps for values."""
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.JoinedStr(values=values):
                return "".join(self.text(value) for value in values)
            case ast.FormattedValue(value=ast.Name(id="self")):
                return f"{self.kind}({GAP})"
            case ast.FormattedValue(value=ast.Attribute(attr="__name__")) if "type(self)" in ast.unparse(node):
                return self.kind
            case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name):
                return self.named(name)
            case ast.FormattedValue(value=ast.Attribute(attr="remedy")):
                return "make the file again, by the command that the message names"
            case ast.FormattedValue(value=ast.Subscript(value=ast.Name(id=name))):
                return self.one_of(name)
            case ast.IfExp(body=one, orelse=other) | ast.FormattedValue(value=ast.IfExp(body=one, orelse=other)):
                return " / ".join(text for text in (self.text(one), self.text(other)) if re.search(r"\w", text)) or GAP
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.text(left) + self.text(right)
            case _:
                return GAP

    def named(self, name: str) -> str:
        """Write a text that was put together before under a name; other names are values."""
        for scope, nodes in ((self.scope, ast.walk(self.scope)), (self.module, iter(self.module.body))):
            texts = [each.value for each in nodes if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == name]
            # a name whose text is made of itself is a value
            texts = [text for text in texts if name not in {ast.unparse(part) for part in ast.walk(text)}]
            if len(texts) == 1 and isinstance(texts[0], ast.JoinedStr | ast.Constant | ast.BinOp | ast.IfExp):
                whole = texts[0].value if isinstance(texts[0], ast.Constant) else None
                return str(whole) if isinstance(whole, int) and scope is self.module else self.text(texts[0])
        return self.imported(name)

    def imported(self, name: str) -> str:
        """Write a text that another module of the package gives a name."""
        for node in self.module.body:
            if isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names} and name.isupper():
                path = PACKAGE.parent.joinpath(*(node.module or "").split(".")).with_suffix(".py")
                home = ast.parse(path.read_text(encoding="utf-8"))
                return _Place("", home, home).named(name)
        return GAP

    def one_of(self, name: str) -> str:
        """Write the values of a table of the module, of which a message shows one."""
        tables = [
            each.value for each in self.module.body if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == name
        ]
        values = tables[0].values if len(tables) == 1 and isinstance(tables[0], ast.Dict) else ()
        return " / ".join(dict.fromkeys(self.text(value) for value in values)) or GAP
