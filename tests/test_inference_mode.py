"""A prompt read in inference mode may be gone on with outside it: buffers made there are copied before they are written."""

import pytest
import torch

from hyperattention import policies
from hyperattention.cache.audited import AuditedStore
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.store import Store

ROOM, SCALE = CacheBudget(24, 2, 8), 8**-0.5


def stores() -> dict[str, Store]:
    return {
        "means": CompressingStore(policies.ClusterMeans(latest=4), ROOM),
        "heavy hitters": CompressingStore(policies.HeavyHitters(), ROOM),
        "pages": policies.TopPages(page=2, most_queries=4).store(ROOM, 0, 0, None),
        "look once": policies.LookOnce(pages=policies.TopPages(page=2, most_queries=4)).store(ROOM, 0, 0, None),
        "subgen": policies.SubGen(delta=3.0, samples=2, value_samples=4, most_clusters=99).store(ROOM, 0, 0, None),
        "audited": AuditedStore(CompressingStore(policies.Latest(), ROOM), 2, 0),
    }


@pytest.mark.parametrize("name", stores())
def test_a_store_goes_on_outside_inference_mode(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 90, 8, generator=generator) for heads in (4, 2, 2))
    outs = []
    for inside in (40, 90):
        store = stores()[name]
        for at in [slice(0, 40), *(slice(n, n + 1) for n in range(40, 90))]:
            with torch.inference_mode(at.start < inside), torch.no_grad():
                store.append(k[:, :, at], v[:, :, at])
                out = None if store.is_whole else store.attend(q[:, :, at], SCALE).out.clone()
                store.end_step(q[:, :, at], SCALE)
        outs.append(out)
    assert outs[0] is not None
    assert torch.equal(*outs)
