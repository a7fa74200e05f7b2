"""Tasks, one family a file: what is hidden in a context, and what is asked."""

from collections.abc import Callable
from types import MappingProxyType

from hyperattention.evaluation.item import Item
from hyperattention.evaluation.tasks.needle import multi_key, single
from hyperattention.evaluation.tasks.setting import Setting

Task = Callable[[Setting], tuple[Item, ...]]

TASKS: MappingProxyType[str, Task] = MappingProxyType(
    {
        "single": single,
        "multi-key": multi_key,
    }
)
