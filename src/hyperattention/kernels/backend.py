"""The choice of the kernel for a tensor: Triton's on a GPU if Triton is installed, PyTorch's otherwise."""

from importlib.util import find_spec

import torch
from torch import Tensor

# a wider key would not fit a program's registers
WIDEST = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# looked up once, without an import, because a compiler that traces cannot do it; Triton comes with GPU builds of torch
TRITON_INSTALLED = find_spec("triton") is not None


def capable(index: int) -> bool:
    """Return whether Triton compiles for a CUDA device: NVIDIA GPUs from compute capability 8.0 on, and AMD GPUs."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def triton_reads(*tensors: Tensor) -> bool:
    """Return whether the Triton kernels support these queries, keys and values.

    Args:
        *tensors: of any shape; the last axis holds the numbers of a query, key or value.

    Returns:
        whether they do; PyTorch handles float64, vectors of more than 256 numbers and old devices.
    """
    fits = all(x.device.type == "cuda" and x.dtype in _DTYPES and x.shape[-1] <= WIDEST for x in tensors)
    return fits and TRITON_INSTALLED and capable(tensors[0].device.index or 0)
