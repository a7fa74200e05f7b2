"""What a GPU would have to launch, counted without one: a decoding step of each store, and a backward pass."""

import runpy
from pathlib import Path

import pytest
import torch

from random_lists import make_selection, make_tensors

COUNTS = Path(__file__).parent.parent / "benchmarks" / "gpu" / "decode_counts.py"
# of most steps on a GPU; of which attention; and in PyTorch's operators alone. Two copies append a token
STEPS = {
    "cluster means": (6, 2, 14),  # two more for the queries that the policy reads
    "uniform sample": (4, 2, 12),
    "latest keys": (4, 2, 12),
    "heavy hitters": (20, 2, 28),  # each key's share of attention is counted
    "best pages": (4, 2, 30),
    "pages of the layer above": (4, 2, 20),
}


def test_a_decoding_step_takes_few_launches() -> None:
    counts = runpy.run_path(str(COUNTS))
    found = {}
    for name in counts["stores"]():
        fused, plain = (counts["count"](counts["stores"]()[name], fused=fused).usual for fused in (True, False))
        found[name] = fused.total(), sum(fused[each] for each in counts["LAUNCHES"]), plain.total()
    assert found == STEPS


@pytest.mark.parametrize(("dtype", "casts"), [(torch.bfloat16, 2), (torch.float32, 0)])
def test_a_backward_pass_takes_at_most_four_launches(dtype: torch.dtype, casts: int, monkeypatch) -> None:
    pytest.importorskip("triton", reason="the test extra installs Triton, which CPU builds of torch do not bring")
    from hyperattention.kernels.launch import Launch
    from hyperattention.kernels.list.operator import fields
    from hyperattention.kernels.list.reference import Lists
    from hyperattention.kernels.list.triton_backward import backward

    kernels = []
    monkeypatch.setattr(Launch, "run", lambda self: kernels.append(self.kernel))
    q, k, v = make_tensors(dtype)
    lists = Lists(*fields(make_selection()))
    # queries by head, as the forward pass leaves its results
    q = q[:, :, None].transpose(1, 2).contiguous().transpose(1, 2)
    out = q.new_zeros(*q.shape[:4], v.shape[2]).transpose(1, 2).contiguous().transpose(1, 2)
    lse = out[..., 0].float().transpose(1, 2).contiguous().transpose(1, 2)
    with runpy.run_path(str(COUNTS))["Launches"]() as counted:
        backward((out, lse), (q, k, v, out, lse), lists, 0.3)
    assert len(kernels) == 2
    assert counted.counts == ({"_to_copy": casts} if casts else {})
