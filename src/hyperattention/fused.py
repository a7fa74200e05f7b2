"""Choose which of torch's fused kernels computes exact attention, before anything runs; None if no kernel can."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention

from hyperattention.kernels.cpu_flash import FOLDED_ROWS, cpu_flash
from hyperattention.types import Partial

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FusedCall:
    """Rows that each see at least one key, and all keys that at least one of them sees.

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: factor of the scores.
        causal: whether rows see no key after their own position, where the last row stands at the last key.
    """

    q: Float[Tensor, "batch heads queries head_dim"]
    k: Float[Tensor, "batch kv_heads keys head_dim"]
    v: Float[Tensor, "batch kv_heads keys value_dim"]
    scale: float
    causal: bool

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def square(self) -> bool:
        """Whether torch's own causal mask, which starts at the first key, is correct for this call."""
        return not self.causal or self.q.shape[2] == self.k.shape[2]

    @property
    def wants_gradient(self) -> bool:
        """Whether any input needs a gradient."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))


class Kernel(ABC):
    """A way to compute exact attention without a tensor of rows x keys."""

    @abstractmethod
    def output(self, call: FusedCall) -> Tensor:
        """Compute the rows."""

    def attend(self, call: FusedCall) -> Partial:
        """Compute the rows, in the accumulation dtype, and their lse."""
        raise NotImplementedError(f"{self!r} does not give the lse of its rows: use a kernel chosen with lse=True")


@dataclass(frozen=True)
class Plain(Kernel):
    """torch's scaled_dot_product_attention, which chooses its kernel: for all keys, or for a square on the diagonal."""

    def output(self, call: FusedCall) -> Tensor:
        """Call SDPA with these tensors."""
        return scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=call.causal, scale=call.scale, enable_gqa=call.group > 1
        )


@dataclass(frozen=True)
class Folded(Kernel):
    """torch's SDPA with the query heads of a group as rows of one head: each key is then read once for all of them."""

    def output(self, call: FusedCall) -> Tensor:
        """Fold the heads, call SDPA, unfold; only valid if every row sees every key."""
        rows = call.q.unflatten(1, (call.k.shape[1], call.group)).flatten(2, 3)
        out = scaled_dot_product_attention(rows, call.k, call.v, scale=call.scale)
        return out.unflatten(2, (call.group, call.q.shape[2])).flatten(1, 2)


@dataclass(frozen=True)
class CpuFlash(Kernel):
    """torch's fused kernel for CPUs, with lse, and with rows at the end of longer keys."""

    def output(self, call: FusedCall) -> Tensor:
        """Compute the rows in their own dtype."""
        return self._run(call).out

    def attend(self, call: FusedCall) -> Partial:
        """Compute the rows and their lse; the gradient is complete."""
        partial = self._run(call)
        return Partial(partial.out.to(partial.lse.dtype), partial.lse)

    def _run(self, call: FusedCall) -> Partial:
        return cpu_flash(call.q, call.k, call.v, call.scale, causal=call.causal)


@dataclass(frozen=True)
class GpuFlash(Kernel):
    """torch's flash kernel for GPUs, whose causal mask is aligned to the last key; groups of heads stay groups."""

    def output(self, call: FusedCall) -> Tensor:
        """Compute the rows; torch differentiates them."""
        return self._run(call)[0]

    def attend(self, call: FusedCall) -> Partial:
        """Compute the rows and their lse, which has no gradient here."""
        out, lse = self._run(call)
        return Partial(out.to(lse.dtype), lse)

    def _run(self, call: FusedCall) -> tuple[Tensor, Tensor]:
        # the kernel takes widths that are multiples of 8; columns of zeros change no score
        short = -call.q.shape[3] % 8
        q, k, v = (torch.nn.functional.pad(x, (0, short)) if short else x for x in (call.q, call.k, call.v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, call.causal, scale=call.scale)
        return out[..., : call.v.shape[3]], lse


def choose(call: FusedCall, *, lse: bool) -> Kernel | None:
    """Return the kernel for a call; it depends on shapes, dtypes and the device, never on values.

    Args:
        call: rows and keys.
        lse: whether the lse is wanted as well.

    Returns:
        the kernel, or None if exact attention must run in chunks of rows: on other devices, for values of another width than
        keys, under forward-mode differentiation and vmap, and for the gradient of an lse on a GPU.
    """
    if not call.q.shape[0] or call.q.shape[3] != call.v.shape[3] or _transformed(call):
        return None
    if call.q.device.type == "cpu":
        return _choose_on_cpu(call, lse)
    if call.q.device.type != "cuda":
        return Plain() if call.square and not lse else None
    if call.square and not lse:
        return _choose_on_gpu(call)
    flash = call.q.dtype in _HALF and can_use_flash_attention(
        SDPAParams(call.q, call.k, call.v, None, 0.0, False, call.group > 1)
    )
    return GpuFlash() if flash and not (lse and call.wants_gradient) else None


def _choose_on_cpu(call: FusedCall, lse: bool) -> Kernel | None:
    if lse and call.q.dtype != torch.float32:
        # float64 calls want the reference; in half precision the kernel's lse is less exact than float32 rounding
        return None
    if lse or not call.square:
        return CpuFlash()
    few = call.group * call.q.shape[2] <= FOLDED_ROWS
    if not call.causal and call.group > 1 and few:
        return Folded()
    return Plain() if _rows_first(call) else CpuFlash()


def _choose_on_gpu(call: FusedCall) -> Kernel | None:
    if call.group == 1 or call.q.dtype in _HALF:
        return Plain()
    # in float32 and float64 torch would repeat the keys and store every score
    return None if call.causal else Folded()


def _rows_first(call: FusedCall) -> bool:
    """Return whether each row is contiguous in memory; otherwise torch stores every score."""
    return all(x.stride(-1) == 1 for x in (call.q, call.k, call.v))


def _transformed(call: FusedCall) -> bool:
    """Return whether forward-mode differentiation or vmap is active; torch's fused kernels do not support them."""
    if torch.compiler.is_compiling():
        return False
    if any(is_functorch_wrapped_tensor(x) for x in (call.q, call.k, call.v)):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in (call.q, call.k, call.v))


def attend_rows(call: FusedCall, shift: int | None) -> Partial | None:
    """Compute exact attention and its lse if row i sees the first ``i + shift`` keys, limited to the keys that exist.

    Args:
        call: rows and keys; its `causal` is not read.
        shift: keys that the first row sees; None where every row sees every key.

    Returns:
        the rows, 0 with an lse of -inf if a row sees no key; None if no fused kernel can compute all of them.
    """
    empty, calls = _cut(call, shift)
    kernels = [choose(each, lse=True) for each in calls]
    if not calls or None in kernels:
        return None
    parts = [kernel.attend(each) for kernel, each in zip(kernels, calls, strict=True) if kernel is not None]
    if empty:
        shape = (*call.q.shape[:2], empty)
        zero, nothing = parts[0].out.new_zeros((*shape, call.v.shape[3])), parts[0].lse.new_full(shape, -torch.inf)
        parts.insert(0, Partial(zero, nothing))
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))


def output_rows(call: FusedCall, shift: int | None) -> Tensor | None:
    """Compute the rows of `attend_rows` without the lse, which more kernels can do.

    Args:
        call: rows and keys; its `causal` is not read.
        shift: keys that the first row sees; None where every row sees every key.

    Returns:
        the rows, or None if no fused kernel can compute all of them.
    """
    empty, calls = _cut(call, shift)
    kernels = [choose(each, lse=False) for each in calls]
    if not calls or None in kernels:
        return None
    outs = [kernel.output(each) for kernel, each in zip(kernels, calls, strict=True) if kernel is not None]
    if empty:
        outs.insert(0, outs[0].new_zeros((*call.q.shape[:2], empty, call.v.shape[3])))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _cut(call: FusedCall, shift: int | None) -> tuple[int, list[FusedCall]]:
    """Cut rows into those that see no key (returned as a count), those on the diagonal, and those that see every key."""
    rows, keys = call.q.shape[2], call.k.shape[2]
    first = keys if shift is None else shift
    empty = min(max(1 - first, 0), rows) if keys else rows
    full = empty if shift is None else min(max(keys - first + 1, empty), rows)
    calls = []
    # branches, not symbolic conditions: a graph with dynamic length leaves conditions open, and kernels do not accept those
    if full - empty > 1:
        calls.append(_part(call, empty, full, first + full - 1, True))
    elif full > empty:
        calls.append(_part(call, empty, full, first + full - 1, False))
    if rows > full:
        calls.append(_part(call, full, rows, keys, False))
    return empty, calls


def _part(call: FusedCall, begin: int, end: int, stop: int, causal: bool) -> FusedCall:
    q = call.q if end - begin == call.q.shape[2] else call.q[:, :, begin:end]
    k, v = (x if stop == x.shape[2] else x[:, :, :stop] for x in (call.k, call.v))
    return FusedCall(q, k, v, call.scale, causal)
