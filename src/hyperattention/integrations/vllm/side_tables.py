"""The side tables of all layers: whether the engine keeps them right, what they take, and their allocation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hyperattention.integrations.vllm.decode_options import DecodeOptions
from hyperattention.integrations.vllm.page_summaries import PageSummaries, width_of

_GIB = 2**30
_OR_EXACT = 'or set `decode` of --additional-config to "exact"'


@dataclass(frozen=True)
class EngineTraits:
    """What an engine does with its cache.

    Args:
        speculative: whether several tokens of a request are computed and some dropped again.
        transfers: whether keys come from another engine, or from memory outside the cache.
        overlaps: whether two halves of a batch are computed at once.
        block_size: number of keys in a block of the scheduler.
        kernel_block_size: number of keys in a block of the kernels.
        blocks: number of blocks.
    """

    speculative: bool
    transfers: bool
    overlaps: bool
    block_size: int
    kernel_block_size: int
    blocks: int


@dataclass(frozen=True)
class TableShape:
    """The shape of the keys of a layer.

    Args:
        heads: number of kv heads in this process.
        head_dim: width of keys.
        dtype: their dtype.
    """

    heads: int
    head_dim: int
    dtype: torch.dtype

    def memory_bytes(self, engine: EngineTraits, options: DecodeOptions) -> int:
        """Compute the bytes of the layer's table.

        Args:
            engine: the engine.
            options: how tokens are generated.

        Returns:
            the bytes.
        """
        pages = engine.blocks * (engine.kernel_block_size // options.policy.page)
        return self.heads * pages * width_of(options.policy.by, self.head_dim) * self.dtype.itemsize

    def allocate(self, engine: EngineTraits, options: DecodeOptions, device: torch.device) -> PageSummaries:
        """Make the layer's table.

        Args:
            engine: the engine.
            options: how tokens are generated.
            device: device of the keys.

        Returns:
            the table.
        """
        return PageSummaries.empty(
            options.policy.by,
            options.policy.page,
            blocks=engine.blocks,
            block_size=engine.kernel_block_size,
            heads=self.heads,
            head_dim=self.head_dim,
            like=torch.empty(0, dtype=self.dtype, device=device),
        )


def check_engine(engine: EngineTraits, options: DecodeOptions) -> None:
    """Check that every summary can be kept right.

    Args:
        engine: the engine.
        options: how tokens are generated.

    Raises:
        ValueError: if it cannot; the message gives the reason and the remedy.
    """
    if engine.speculative:
        raise ValueError(
            "speculative decoding computes several tokens of a request in a step, and decoding by the best pages one: start "
            f"vLLM without --speculative-config, {_OR_EXACT}"
        )
    if engine.transfers:
        raise ValueError(
            "keys that come from another engine, or from an offloaded cache, have no summaries of their pages: start vLLM "
            f"without --kv-transfer-config and --kv-offloading-size, {_OR_EXACT}"
        )
    if engine.overlaps:
        raise ValueError(
            "two halves of a batch at once (dual batch overlap) would need two side tables of pages: start vLLM without "
            f"--enable-dbo, {_OR_EXACT}"
        )
    if engine.block_size != engine.kernel_block_size:
        raise ValueError(
            f"vLLM cuts blocks of {engine.block_size} keys into blocks of {engine.kernel_block_size} for its kernels, which "
            f"the side table of pages does not follow: start vLLM with --block-size {engine.kernel_block_size}, {_OR_EXACT}"
        )
    if engine.block_size % options.policy.page:
        raise ValueError(
            f"a block of {engine.block_size} keys is no whole number of pages of {options.policy.page}: give a `page` that "
            f"divides it in the `policy` of `decode`, or another --block-size, {_OR_EXACT}"
        )


def check_memory(shapes: Sequence[TableShape], engine: EngineTraits, options: DecodeOptions) -> int:
    """Check what the tables of all layers take in this process.

    Args:
        shapes: the layers.
        engine: the engine.
        options: how tokens are generated.

    Returns:
        their bytes.

    Raises:
        ValueError: if they take more than the options allow.
    """
    needed = sum(shape.memory_bytes(engine, options) for shape in shapes)
    if needed > options.memory_gib * _GIB:
        raise ValueError(
            f"the summaries of {engine.blocks} blocks in {len(shapes)} layers take {needed / _GIB:.3g} GiB beside vLLM's "
            f"memory, and `memory_gib` of `decode` allows {options.memory_gib:g}: give a larger `page`, start vLLM with "
            "a smaller cache, or raise `memory_gib` if so much is left"
        )
    return needed
