"""The reference model at 32,768 tokens: loss and retrieval through the engine are those through transformers."""

import pytest
import torch

import hyperattention as ha
from engines import run_engines
from hyperattention.files.model_folder import WEIGHTS
from hyperattention.integrations.transformers import use
from hyperattention.reference.model import load_reference
from hyperattention.reference.samples import samples_of_documents
from hyperattention.reference.text import held_out_documents

LENGTH, CHUNK = 32_768, 8192
METHOD = ha.lean_method(LENGTH)
# float32 in four layers, of two implementations
COVERED = 1e-4


@pytest.fixture(scope="module")
def sample():
    (sample,) = samples_of_documents(held_out_documents(LENGTH, 1, seed=3))
    return sample


@pytest.fixture(scope="module")
def loaded():
    return load_reference()


@pytest.fixture(scope="module")
def engine(sample):
    (result,) = run_engines(
        [
            {
                "model": str(WEIGHTS),
                "batches": [[sample.tokens[:-1].tolist()]],
                "sampling": {"max_tokens": 1, "prompt_logprobs": 1},
                "llm": {
                    "max_model_len": LENGTH,
                    "max_num_batched_tokens": CHUNK,
                    "max_num_seqs": 2,
                    "additional_config": {"hyperattention": {"method": "lean", "min_length": 0, "seed": 5}},
                },
            }
        ]
    )
    return result


@torch.no_grad()
def logits_of(model, sample, method):
    with use(model, method, seed=5, warn=False) as calls:
        logits = model(sample.tokens[None, :-1], use_cache=False).logits[0]
    return logits, calls.counts.approximated


def test_loss_and_retrieval_are_those_of_transformers(engine, sample, loaded):
    logits, approximated = logits_of(loaded.model, sample, METHOD)
    assert approximated == 4
    assert engine["approximated"] == 4 * (LENGTH // CHUNK)
    assert engine["listed_pairs"] / engine["exact_pairs"] < 0.1
    ours = torch.tensor([-loss for loss, _ in engine["prompt"][0]], dtype=torch.float64)
    targets = sample.tokens[1:-1]
    theirs = torch.nn.functional.cross_entropy(logits[:-1].double(), targets, reduction="none")
    # the method reads every key of these queries, so nothing is drawn
    assert float((ours - theirs)[:900].abs().max()) < COVERED
    # the two compute positions to other last digits, which moves points of the draws to neighbouring keys: the same
    # estimator with other draws, so the losses differ by its noise. Blocks of a tile are nearly independent
    differences = (ours - theirs)[sample.counted[:-1]]
    blocks = differences[: len(differences) // 64 * 64].view(-1, 64).mean(1)
    error = float(blocks.std() / len(blocks) ** 0.5)
    assert error < 0.005
    assert abs(float(differences.mean())) <= 4.5 * error
    # retrieval of hidden digits, at all distances
    first = torch.tensor([token for _, token in engine["prompt"][0]])
    answers = (torch.tensor(sample.answer_index)[:, None] + torch.arange(sample.answer_size) - 1).flatten()
    answers = answers[answers < len(targets)]
    found, same = ((x[answers] == targets[answers]).double().mean() for x in (first, logits[:-1].argmax(-1)))
    assert float(same) > 0.5
    assert abs(float(found - same)) <= 0.03
