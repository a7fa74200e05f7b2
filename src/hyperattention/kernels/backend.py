"""The choice of the kernel for a tensor: Triton's on a GPU if Triton is installed, PyTorch's otherwise."""

from importlib.util import find_spec

import torch
from torch import Tensor

# a wider key would not fit a program's registers
WIDEST = 256
# programs along any but the first axis of a grid
_MOST_LISTS = 65_535
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# looked up once, without an import, because a compiler that traces cannot do it; Triton comes with GPU builds of torch
TRITON_INSTALLED = find_spec("triton") is not None


def capable(index: int) -> bool:
    """Return whether Triton compiles for a CUDA device: NVIDIA GPUs from compute capability 8.0 on, and AMD GPUs."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def grid_holds(lists: int) -> bool:
    """Return whether a grid has room for kernels that choose keys: each list of a batch is a place on its second axis.

    Args:
        lists: kv heads of all batch rows.

    Returns:
        whether it has; PyTorch chooses otherwise.
    """
    return lists <= _MOST_LISTS


def triton_reads(*tensors: Tensor) -> bool:
    """Return whether the Triton kernels support these queries, keys and values.

    Args:
        *tensors: of any shape; the last axis holds the numbers of a query, key or value.

    Returns:
        whether they do; PyTorch handles float64, vectors of more than 256 numbers and old devices.
    """
    fits = all(x.device.type == "cuda" and x.dtype in _DTYPES and x.shape[-1] <= WIDEST for x in tensors)
    return fits and TRITON_INSTALLED and capable(tensors[0].device.index or 0)
