"""The backend of vLLM that computes exact rows and writes the cache, by platform."""

from typing import Any

import torch
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from hyperattention.integrations.vllm.pages import CachePages, find_order


def stock_backend() -> Any:
    """Return vLLM's own backend of this machine.

    Returns:
        the class; FlashAttention on a GPU.

    Raises:
        ValueError: if the platform has neither.
    """
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import (  # pyright: ignore[reportMissingImports]
            CPUAttentionBackend,
        )

        return CPUAttentionBackend
    if current_platform.is_cuda():
        from vllm.v1.attention.backends.flash_attn import (  # pyright: ignore[reportMissingImports]
            FlashAttentionBackend,
        )

        return FlashAttentionBackend
    raise ValueError(
        f"hyperattention has no backend for the platform {current_platform.device_name}: start vLLM with its own attention "
        "backend"
    )


def cache_pages(spec: Any, isa: str | None) -> CachePages:
    """Find out how vLLM stores keys, by writing a page where kernels have orders of their own.

    Args:
        spec: vLLM's description of the cache.
        isa: name of the CPU's kernel; None on a GPU.

    Returns:
        the layout of pages.

    Raises:
        ValueError: if the order is unknown.
    """
    if isa is None:
        return CachePages(spec.head_size, None)
    from vllm import _custom_ops as ops  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    # no two numbers of a key are alike, so that no other order gives the same page
    size = spec.block_size, 1, spec.head_size
    key = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(spec.dtype)
    page = torch.zeros(1, 1, 2 * spec.block_size, spec.head_size, dtype=spec.dtype, device="cpu")
    written, values = page.chunk(2, dim=2)
    slots = torch.arange(spec.block_size, dtype=torch.int64, device="cpu")
    ops.cpu_attn_reshape_and_cache(key, key, written, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
    order = find_order(written[0], key)
    if order is None or not torch.equal(values[0], key.transpose(0, 1)):
        raise ValueError(
            f"vLLM's kernel {isa!r} stores {spec.dtype} keys in an order that hyperattention does not read: start vLLM with "
            "--dtype float32 or float16, or with its own attention backend"
        )
    return CachePages(spec.head_size, order)
