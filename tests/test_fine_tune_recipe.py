"""The recipe that fine-tunes through a trainer: each follows exact attention, and what cannot run is refused."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import hyperattention as ha
from hyperattention import select

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

FOLDER = Path(__file__).parents[1] / "training"
SMALL = ha.Method(ha.Sinks(4), ha.Window(32), select.DrawAlike(64), tile=32)
SHORT = ("--length", 512, "--positions", 2048, "--steps", 2)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, with little text to read and a method for short sequences."""
    monkeypatch.syspath_prepend(FOLDER)
    sources, script = import_module("sources"), import_module("fine_tune")
    monkeypatch.setattr(script, "corpus", lambda: (sources.read_source(Path(json.__file__).parent, "json"),))
    monkeypatch.setitem(script.METHODS, "default", SMALL)
    yield script
    for name in ("fine_tune", "batches", "sources", "stages"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(recipe: ModuleType, tmp_path: Path) -> Callable[..., dict]:
    def run(*arguments: object) -> dict:
        recipe.main([str(word) for word in (*SHORT, *arguments, "--out", tmp_path / "out.jsonl")])
        return json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])

    return run


@pytest.mark.heavy
@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_trainer_follows_exact_attention(trainer: str, run: Callable[..., dict]) -> None:
    if trainer == "trl":
        pytest.importorskip("trl", reason="TRL brings many packages: the recipe's page says with which version it ran")
    ours, exact = run("--trainer", trainer), run("--trainer", trainer, "--method", "exact")
    assert (ours["approximated"], ours["calls"], exact["approximated"], exact["calls"]) == (8, 8, 0, 8)
    assert ours["share_of_exact"] < 1 == exact["share_of_exact"]
    assert len(ours["losses"]) == len(exact["losses"]) == 2
    # the same data in the same order
    assert ours["losses"] == pytest.approx(exact["losses"], abs=0.1)


def test_jumping_positions_are_one_document(recipe: ModuleType) -> None:
    """A mask without padding goes with them: without it transformers reads a jump as the start of another document."""
    from hyperattention.reference.model import load_reference

    batches = recipe.Batches([b"word " * 4000], recipe.Stage(512, 1, 1), max_length=4096, repeats=False, seed=0)
    examples = (recipe.Examples(batches, 9, jumps=True)[number] for number in range(9))
    example = next(x for x in examples if (x["position_ids"].diff() > 1).any())
    last = example["position_ids"].diff().argmax() + 1
    given = {key: value[None] for key, value in example.items() if key != "labels"}
    model = recipe.longer(load_reference().model, 4096)
    changed = given["input_ids"].clone()
    changed[0, 0] += 1
    logits, others = (
        model(**given | {"input_ids": tokens}, use_cache=False).logits for tokens in (given["input_ids"], changed)
    )
    # tokens after the jump see those before it
    assert (logits - others)[0, last:].abs().max() > 1e-4


def test_what_cannot_run_is_refused(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="lists all keys; give a longer one"):
        recipe.main(["--length", "64"])
    monkeypatch.setattr(recipe.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="accelerate runs DDP instead"):
        recipe.main(["--fsdp"])
