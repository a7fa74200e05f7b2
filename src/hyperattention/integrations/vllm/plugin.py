"""The entry point of vLLM's plugins: it names the backend's class, and imports nothing of the library that computes."""

import os

# vLLM ignores the custom backend on a CPU, so a user has to ask that the only one there is replaced
CPU_VARIABLE = "HYPERATTENTION_VLLM_CPU"
_FOLDER = "hyperattention.integrations.vllm"


def register() -> None:
    """Name the backend in vLLM's slot ``CUSTOM``; with ``HYPERATTENTION_VLLM_CPU=1``, also in place of the CPU's backend.

    vLLM calls it in each of its processes, and a second call changes nothing. Nothing is approximated until a user selects
    ``--attention-backend CUSTOM``, or sets the variable on a CPU.
    """
    # vLLM is there: it calls this
    from vllm.v1.attention.backends.registry import (  # pyright: ignore[reportMissingImports]
        AttentionBackendEnum,
        register_backend,
    )

    register_backend(AttentionBackendEnum.CUSTOM, f"{_FOLDER}.backend.HyperAttentionBackend")
    if asked_on_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{_FOLDER}.backend.HyperAttentionBackend")
        # vLLM selects these by itself for multi-head latent attention, which would then run without this backend
        for name in ("CPU_MLA", "AMX_MLA"):
            register_backend(AttentionBackendEnum[name], f"{_FOLDER}.refused.RefusedLatentBackend")


def asked_on_cpu() -> bool:
    """Return whether the user asked that the backend of the CPU is replaced.

    Returns:
        True for ``1``, False for ``0`` and if the variable is not set.

    Raises:
        ValueError: if the variable has another value.
    """
    value = os.environ.get(CPU_VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{CPU_VARIABLE} is {value!r}: set it to 1 to replace the attention of the CPU, or to 0")
    return value == "1"
