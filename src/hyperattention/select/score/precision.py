"""In which precision weights are estimated: an estimate decides what is drawn, never what is computed from it."""

import torch
from torch import Tensor

# instructions that multiply bfloat16 at twice the rate of float32, as torch names them; without one it is emulated, slowly
_FAST = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
# the same for 8-bit integers, at four times that rate, in a library that torch may lack
_FAST_INTEGERS = ("avx512_vnni", "avx_vnni", "amx_int8")


def _can(names: tuple[str, ...]) -> bool:
    # a torch that cannot tell is taken to be slow
    tell = getattr(torch.cpu, "get_capabilities", dict)
    found = tell()
    return any(found.get(name, False) for name in names)


# asked once: a compiler that traces `for_estimates` could not ask
_CPU_IS_FAST = _can(_FAST)
_CPU_INTEGERS_ARE_FAST = _can(_FAST_INTEGERS) and torch.backends.mkldnn.is_available()


def for_estimates(x: Tensor) -> Tensor:
    """Round float32 to bfloat16 where the device multiplies that faster; leave everything else alone."""
    fast = _CPU_IS_FAST if x.device.type == "cpu" else x.device.type == "cuda"
    return x.bfloat16() if fast and x.dtype == torch.float32 else x


def integers_are_fast(x: Tensor) -> bool:
    """Return whether the device of `x` multiplies 8-bit integers faster still, in a call that torch has for it."""
    return _CPU_INTEGERS_ARE_FAST and x.device.type == "cpu" and x.dtype == torch.float32
