"""Open blocks of `use` on a model: the block that its attention calls follow, and the model's state before all blocks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hyperattention.integrations.transformers.forward import ATTRIBUTE, ForwardSettings

# locked while a block opens or closes, never while a model runs
_LOCK = threading.Lock()


class Block:
    """One open block of `use`.

    Args:
        settings: the settings of its attention calls.
        configs: every configuration in the model, outer configurations first.
    """

    def __init__(self, settings: ForwardSettings, configs: list[PreTrainedConfig]) -> None:
        """Store the thread, and the attention implementations to restore at the end of the block."""
        self.settings, self.thread = settings, threading.get_ident()
        self.before = [(config, config._attn_implementation) for config in configs]


@contextmanager
def open_block(model: nn.Module, root: PreTrainedModel, settings: ForwardSettings, name: str) -> Iterator[None]:
    """Run a model's attention with some settings inside the block, and restore the model afterwards.

    The modules of a model hold a stack of its open blocks; attention calls follow the latest block. A block that closes is
    removed from any place in the stack, and the block above it receives the state to restore. The model is therefore
    restored for any order in which blocks close. A block is refused while another thread has a block on the same modules.

    Args:
        model: the model; all its modules follow the settings.
        root: the transformers model in `model`.
        settings: the settings of attention calls.
        name: the name of the attention implementation that reads the settings.

    Yields:
        nothing.

    Raises:
        RuntimeError: if a block that opened later is still open at the end; calls of this block may have followed the other.
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
            f"a block of `use` on this {type(root).__name__} was closed while a block that was opened later is still open: "
            "calls of the first block may have used the second block's method; close blocks in the reverse order, or use a "
            "separate model for each"
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
                    "follows one method at a time: wait until that block ends, or use a separate model for each thread"
                )


def _close(block: Block, modules: list[nn.Module], name: str) -> bool:
    """Remove a block from the stack, and return whether another block was above it."""
    above: dict[int, Block] = {}
    for module in modules:
        blocks = blocks_of(module)
        if block not in blocks:
            continue
        place = blocks.index(block)
        above |= {id(later): later for later in blocks[place + 1 :][:1]}
        _attach(module, blocks[:place] + blocks[place + 1 :])
    # outer configurations first, because an assignment to one also changes the configurations nested in it
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
    """List every configuration in a model, outer configurations first.

    Args:
        model: a transformers model, or a module that contains one.

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
