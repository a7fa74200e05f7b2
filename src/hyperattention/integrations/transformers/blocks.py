"""Open blocks of `use` on a model: which one its attention calls follow, and what the model was before any of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hyperattention.integrations.transformers.forward import ATTRIBUTE, ForwardSettings

# held while a block opens or closes, never while a model runs
_LOCK = threading.Lock()


class Block:
    """One open block of `use`.

    Args:
        settings: what its calls follow.
        configs: every configuration under the model, outer ones first.
    """

    def __init__(self, settings: ForwardSettings, configs: list[PreTrainedConfig]) -> None:
        """Note the thread, and the implementations that leaving the block brings back."""
        self.settings, self.thread = settings, threading.get_ident()
        self.before = [(config, config._attn_implementation) for config in configs]


@contextmanager
def open_block(model: nn.Module, root: PreTrainedModel, settings: ForwardSettings, name: str) -> Iterator[None]:
    """Run a model's attention by some settings, and bring the model back as it was.

    The open blocks of a model are a stack, which its modules hold: calls follow the latest. A block that closes takes
    itself out of the stack wherever it is, and the block above it takes over what the model was before, so the model ends
    as it began in whatever order blocks close. A block is refused while another thread has one on the same modules.

    Args:
        model: whose modules follow the settings.
        root: the transformers model in it.
        settings: what calls follow.
        name: of the attention implementation that reads them.

    Yields:
        nothing.

    Raises:
        RuntimeError: if a block that opened later is still open at the end, so that calls of this one may have followed it.
    """
    modules = list(model.modules())
    with _LOCK:
        _refuse_other_threads(root, modules)
        block = Block(settings, list_configs(model))
        try:
            for module in modules:
                setattr(module, ATTRIBUTE, (*blocks_of(module), block))
            root.set_attn_implementation(name)
        except BaseException:
            _close(block, modules, name)
            raise
    overlapped = True
    try:
        yield
    finally:
        with _LOCK:
            overlapped = _close(block, modules, name)
    if overlapped:
        raise RuntimeError(
            f"a block of `use` on this {type(root).__name__} was left while one that was entered later is still open: calls "
            "of the first may have followed the second; leave blocks in the reverse order, or give each its own model"
        )


def blocks_of(module: nn.Module) -> tuple[Block, ...]:
    """List the blocks that are open on a module.

    Args:
        module: any module.

    Returns:
        the blocks, the latest last.
    """
    return module.__dict__.get(ATTRIBUTE, ())


def _refuse_other_threads(root: PreTrainedModel, modules: list[nn.Module]) -> None:
    here = threading.get_ident()
    for module in modules:
        for block in blocks_of(module):
            if block.thread != here:
                raise ValueError(
                    f"another thread has a block of `use` open on this {type(root).__name__}, and a model's attention "
                    "follows one method at a time: wait until that block ends, or give each thread its own model"
                )


def _close(block: Block, modules: list[nn.Module], name: str) -> bool:
    """Take a block out of the stack, and tell whether another lay on it."""
    above: dict[int, Block] = {}
    for module in modules:
        blocks = blocks_of(module)
        if block not in blocks:
            continue
        place = blocks.index(block)
        above |= {id(later): later for later in blocks[place + 1 :][:1]}
        _attach(module, blocks[:place] + blocks[place + 1 :])
    # outer configs first: assigning one also assigns those nested in it
    for config, implementation in block.before:
        heirs = [later for later in above.values() if _take_over(later, config, implementation)]
        config._attn_implementation = name if heirs else implementation
    return bool(above)


def _take_over(block: Block, config: PreTrainedConfig, implementation: str | None) -> bool:
    covered = any(each is config for each, _ in block.before)
    block.before = [(each, implementation if each is config else known) for each, known in block.before]
    return covered


def _attach(module: nn.Module, blocks: tuple[Block, ...]) -> None:
    if blocks:
        setattr(module, ATTRIBUTE, blocks)
    else:
        module.__dict__.pop(ATTRIBUTE, None)


def list_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """List every configuration under a model, outer ones first.

    Args:
        model: a transformers model, or a module that holds one.

    Returns:
        the configurations, each once.
    """
    found: dict[int, PreTrainedConfig] = {}
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    queue = [cast(PreTrainedConfig, each.config) for each in models]
    while queue:
        config = queue.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            nested = (getattr(config, name, None) for name in config.sub_configs)
            queue += [sub for sub in nested if sub is not None]
    return list(found.values())
