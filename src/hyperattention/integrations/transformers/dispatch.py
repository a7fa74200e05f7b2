"""The check whether a model's attention can be switched, read from the source code of its modules, as in transformers.

A flag of the model class says that the model was tested with other attention functions, but several hybrid models work
without the flag. The check therefore reads the code: attention must look up its function in transformers' table at each
call, pass on its mask unchanged, and not depend on the name of the function. Without the flag, the class must at least
support SDPA, because SDPA, like this package, reads from each module whether attention is causal.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache as remembered
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_TABLE = "ALL_ATTENTION_FUNCTIONS"
_OF_ITS_OWN = ("scaled_dot_product_attention", "softmax(", "multi_head_attention_forward")


def check_dispatch(root: PreTrainedModel) -> None:
    """Check that a model's attention can be switched without another change to its computation.

    Args:
        root: the model.

    Raises:
        ValueError: if it cannot be switched; the message gives the class and the reason.
    """
    kinds = list(dict.fromkeys(type(module) for module in root.modules()))
    # without the flag, no module may compute attention itself
    own = [] if root.is_backend_compatible() else [kind.__name__ for kind in kinds if _attends_itself(kind)]
    if own or not root._can_set_attn_implementation() or not any(_dispatches(kind) for kind in kinds):
        whose = f": {', '.join(own)} computes attention itself" if own else ""
        raise ValueError(
            f"{type(root).__name__} does not dispatch its attention through transformers' AttentionInterface{whose}, so it "
            "cannot be switched: use a model whose attention calls the interface (Llama, Qwen, Mistral, Gemma, ...)"
        )
    if not (root.is_backend_compatible() or root._supports_sdpa):
        raise ValueError(
            f"{type(root).__name__} declares neither _supports_attention_backend nor _supports_sdpa, so its modules "
            "need not say which of them are causal, and it cannot be switched: run it with attn_implementation='eager'"
        )
    for kind in kinds:
        if _dispatches(kind) and (problem := _what_it_adds(kind)) is not None:
            raise ValueError(
                f"{kind.__name__} {problem}, which another attention function would lose or misread, so "
                f"{type(root).__name__} cannot be switched: run it with attn_implementation='sdpa' or 'eager'"
            )


@remembered
def _dispatches(kind: type[nn.Module]) -> bool:
    return _TABLE in _source(kind.forward)


@remembered
def _attends_itself(kind: type[nn.Module]) -> bool:
    if "Attention" not in kind.__name__ or _dispatches(kind):
        return False
    source = _source(kind)
    return any(name in source for name in _OF_ITS_OWN)


@remembered
def _what_it_adds(kind: type[nn.Module]) -> str | None:
    """Describe code in an attention's forward that depends on the name of the function, or changes the mask."""
    for node in ast.walk(ast.parse(_source(kind.forward))):
        if isinstance(node, ast.Compare) and "_attn_implementation" in ast.unparse(node):
            if "'sdpa'" in ast.unparse(node):
                return f"selects keys in the mask only where {ast.unparse(node)}"
        elif isinstance(node, ast.Assign) and any(map(_names_mask, node.targets)) and _computes_mask(node.value):
            return f"changes its mask (`{ast.unparse(node)[:80]}`)"
    return None


def _computes_mask(value: ast.expr) -> bool:
    """Return whether an expression computes a new mask from a mask; choosing or slicing a mask does not count."""
    return any(any(map(_names_mask, ast.walk(node))) for node in _operations(value))


def _operations(value: ast.expr) -> Iterator[ast.expr]:
    for node in ast.walk(value):
        if isinstance(node, ast.BinOp) or (
            isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr == "get")
        ):
            yield node


def _names_mask(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and "mask" in node.id


def _source(subject: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(subject)))
    except (OSError, TypeError):
        return ""
