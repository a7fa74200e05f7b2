"""The precision of estimated weights: estimates only determine the draws, so low precision is enough."""

import torch
from torch import Tensor

# CPU features, by torch's names, that multiply bfloat16 at twice the rate of float32; without them bfloat16 is slow
_FAST = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
# the same for 8-bit integers, at four times that rate, with a library that a build of torch may lack
_FAST_INTEGERS = ("avx512_vnni", "avx_vnni", "amx_int8")


def _can(names: tuple[str, ...]) -> bool:
    # if torch does not report the features, they are assumed to be missing
    tell = getattr(torch.cpu, "get_capabilities", dict)
    found = tell()
    return any(found.get(name, False) for name in names)


# read once: a compiler that traces `for_estimates` cannot read it
_CPU_IS_FAST = _can(_FAST)
_CPU_INTEGERS_ARE_FAST = _can(_FAST_INTEGERS) and torch.backends.mkldnn.is_available()


def for_estimates(x: Tensor) -> Tensor:
    """Round float32 to bfloat16 if the device multiplies bfloat16 faster; leave other dtypes unchanged."""
    return x.to(dtype_of_estimates(x.device)) if x.dtype == torch.float32 else x


def dtype_of_estimates(device: torch.device) -> torch.dtype:
    """Return what `for_estimates` rounds float32 to on a device."""
    fast = _CPU_IS_FAST if device.type == "cpu" else device.type == "cuda"
    return torch.bfloat16 if fast else torch.float32


def integers_are_fast(x: Tensor) -> bool:
    """Return whether the device of `x` multiplies 8-bit integers even faster, with an operator of torch."""
    return _CPU_INTEGERS_ARE_FAST and x.device.type == "cpu" and x.dtype == torch.float32
