"""In which precision weights are estimated: an estimate decides what is drawn, never what is computed from it."""

import torch
from torch import Tensor

# instructions that multiply bfloat16 at twice the rate of float32, as torch names them; without one it is emulated, slowly
_FAST = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def _is_cpu_fast() -> bool:
    # a torch that cannot tell is taken to be slow
    tell = getattr(torch.cpu, "get_capabilities", dict)
    found = tell()
    return any(found.get(name, False) for name in _FAST)


# asked once: a compiler that traces `for_estimates` could not ask
_CPU_IS_FAST = _is_cpu_fast()


def for_estimates(x: Tensor) -> Tensor:
    """Round float32 to bfloat16 where the device multiplies that faster; leave everything else alone."""
    fast = _CPU_IS_FAST if x.device.type == "cpu" else x.device.type == "cuda"
    return x.bfloat16() if fast and x.dtype == torch.float32 else x
