"""Training through an approximated model follows training through exact attention."""

import copy

import pytest
import torch

import hyperattention as ha
from hyperattention import select

pytest.importorskip("transformers")

STEPS, LENGTH = 50, 512
DESCENT = ha.HierarchicalSearch(
    (select.Level(32, 8, select.Representatives(1, 3)), select.Level(8, 4, select.Representatives(1, 2))), dim=16
)
# the lists of the default on a CPU, and those of a search by levels, which needs more draws to come as near
METHODS = {
    "draws for alike queries": ha.Method(ha.Sinks(4), ha.Window(64), select.DrawAlike(96), tile=32),
    "draws by a search": ha.Method(ha.Sinks(4), ha.Window(64), ha.Draw(128, by=DESCENT), tile=32),
}


def _losses(model, batches, method):
    from hyperattention.integrations.transformers import use

    model = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    with use(model, method) as counter:
        for tokens in batches:
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses), counter.counts


@pytest.mark.heavy
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_fifty_steps_of_fine_tuning_track_exact_attention(method: ha.Method):
    from hyperattention.reference.model import load_reference
    from hyperattention.reference.text import held_out_text

    data = torch.frombuffer(bytearray(held_out_text()[: STEPS * LENGTH]), dtype=torch.uint8).long()
    batches = data.view(STEPS, 1, LENGTH)
    model = load_reference().model
    exact, none = _losses(model, batches, ha.Exact())
    ours, counts = _losses(model, batches, method)
    assert method.cost(LENGTH).share_of_exact < 1
    assert counts.approximated == 4 * STEPS
    assert none.approximated == 0
    # the curves wander together: far closer to one another than either to its own mean
    assert (ours - exact).abs().mean() <= 0.1 * exact.std()
    assert (ours - exact).mean().abs() <= 0.02
