"""Tasks, one family in each file: the facts hidden in a context, and the questions."""

from collections.abc import Callable, Sequence
from types import MappingProxyType

from hyperattention.evaluation.item import Item
from hyperattention.evaluation.tasks.line_retrieval import line_retrieval
from hyperattention.evaluation.tasks.needle import multi_key, multi_query, multi_value, single
from hyperattention.evaluation.tasks.setting import Setting
from hyperattention.evaluation.tasks.tracking import tracking

Task = Callable[[Setting], tuple[Item, ...]]

TASKS: MappingProxyType[str, Task] = MappingProxyType(
    {
        "single": single,
        "multi-key": multi_key,
        "multi-value": multi_value,
        "multi-query": multi_query,
        "tracking": tracking,
        "lines": line_retrieval,
    }
)


def check_tasks(names: Sequence[str]) -> None:
    """Check the names of tasks.

    Args:
        names: the names.

    Raises:
        ValueError: if a name is unknown.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"unknown tasks {', '.join(unknown)}: choose from {', '.join(TASKS)}")
