"""Which kernel reads a tensor: Triton's on a GPU, where Triton is installed, PyTorch's anywhere else."""

from importlib.util import find_spec

import torch
from torch import Tensor

# a wider key would not fit a program's registers
WIDEST = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# looked up once, and not imported; it comes with GPU builds of torch. A compiler that traces could not look
TRITON_INSTALLED = find_spec("triton") is not None


def capable(index: int) -> bool:
    """Whether Triton compiles for a CUDA device: NVIDIA's from compute capability 8.0 on, and AMD's."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def triton_reads(*tensors: Tensor) -> bool:
    """Return whether the Triton kernels serve these queries, keys and values.

    Args:
        *tensors: of any shape; the last axis holds the numbers of a query, key or value.

    Returns:
        whether they do; float64, vectors of more than 256 numbers and old devices are left to PyTorch.
    """
    fits = all(x.device.type == "cuda" and x.dtype in _DTYPES and x.shape[-1] <= WIDEST for x in tensors)
    return fits and TRITON_INSTALLED and capable(tensors[0].device.index or 0)
