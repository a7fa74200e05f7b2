"""The script that trains the reference model, at sizes that a CPU trains in a second, and the rule of what is held out."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from assertions import assert_exact, assert_same_bits
from hyperattention.reference.model import load_reference
from hyperattention.reference.text import HELD_OUT as PACKAGED
from hyperattention.reference.text import held_out_documents

ROOT = Path(__file__).parents[1]
HELD_OUT = json.loads((ROOT / "src/hyperattention/reference/held_out.json").read_text())["files"]
TINY = ("--width", 32, "--heads", 2, "--kv-heads", 1, "--head-dim", 16, "--hidden", 32, "--layers", 1)
STAGES = ("--stages", "64x2x1", "128x1x3")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> None:
    sys.path.insert(0, str(ROOT / "training"))
    yield
    sys.path.remove(str(ROOT / "training"))
    for name in ("train_reference", "batches", "byte_llama", "muon", "sources", "stages"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def small_library(scripts: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A part of the standard library is enough, and quick to read."""
    sources = import_module("sources")
    folder = Path(json.__file__).parent
    monkeypatch.setattr(sources, "standard_library", lambda: sources.read_source(folder, "json"))
    return sources


def train(out: Path, *arguments: object) -> list[dict]:
    words = ("--out", out, *TINY, *STAGES, "--log-every", 1, *arguments)
    import_module("train_reference").main([str(word) for word in words])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "state.pt")["model"]


def test_stages_share_the_steps_and_the_log_says_what_was_trained(tmp_path: Path) -> None:
    first, *lines = train(tmp_path, "--steps", 4)
    assert [line["length"] for line in lines] == [64, 128, 128, 128]
    assert first["settings"]["shape"]["max_length"] == 128
    assert first["settings"]["sources"]["json"]["files"] == 4
    assert first["settings"]["sources"]["json"]["held_out"] == 1
    assert all(abs(line["text_bits"] - 8) < 0.1 for line in lines)
    # the end of a stage is checked on held-out text
    assert ["digits_right" in line for line in lines] == [True, False, False, True]


def test_what_is_written_is_the_model_that_was_trained(tmp_path: Path) -> None:
    train(tmp_path, "--steps", 4)
    loaded, byte_llama = load_reference(tmp_path / "latest"), import_module("byte_llama")
    model = byte_llama.Model(byte_llama.Shape(1, 32, 2, 1, 16, 32, max_length=128))
    model.load_state_dict(weights(tmp_path))
    tokens = torch.randint(256, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = model.half().float()(tokens, torch.arange(128).expand(2, -1))
        theirs = loaded.model(tokens, use_cache=False).logits
    assert ours.std() > 1e-3
    assert_exact(theirs, ours)
    assert loaded.max_length == 128


def test_any_number_of_workers_trains_the_same_model(tmp_path: Path) -> None:
    for workers in (0, 2):
        train(tmp_path / str(workers), "--steps", 4, "--workers", workers)
    alone, helped = (weights(tmp_path / name) for name in ("0", "2"))
    for name, value in alone.items():
        assert_same_bits(helped[name], value)


def test_a_resumed_run_trains_the_model_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = import_module("train_reference")
    train(tmp_path / "whole", "--steps", 4)
    # a state is written after every step, and the run ends in its third
    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    advance = script.Training.advance

    def interrupted(training, *arguments):
        if training.step == 2 and not resumed:
            raise KeyboardInterrupt
        return advance(training, *arguments)

    resumed = False
    monkeypatch.setattr(script.Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", "--steps", 4)
    resumed = True
    lines = train(tmp_path / "parts", "--steps", 4, "--resume", tmp_path / "parts" / "state.pt")
    assert [line["step"] for line in lines[1:]] == [1, 2, 3, 4]
    for name, value in weights(tmp_path / "whole").items():
        assert_same_bits(weights(tmp_path / "parts")[name], value)
    with pytest.raises(SystemExit, match="resume with the same sizes, stages, seed and folders"):
        train(tmp_path / "parts", "--steps", 4, "--seed", 1, "--resume", tmp_path / "parts" / "state.pt")


def test_stages_and_rates_follow_the_share_of_time() -> None:
    stages = import_module("stages")
    by_time = stages.Budget(None, 200.0)
    places = [
        stages.stage_at(stages.SHIPPED, by_time.share(10**6, seconds)) for seconds in (0, 59, 61, 89, 91, 129, 131, 200)
    ]
    assert places == [0, 0, 1, 1, 2, 2, 3, 3]
    assert stages.Budget(8, None).share(2, 1e9) == 0.25
    rates = [stages.rate_at(step, share) for step, share in ((0, 0.0), (59, 0.0), (999, 0.34), (999, 0.675), (999, 1.0))]
    assert rates == pytest.approx([1 / 60, 1, 1, 0.525, 0.05])


def test_training_by_time_ends(tmp_path: Path) -> None:
    _, *lines = train(tmp_path, "--seconds", 0.2)
    assert {line["length"] for line in lines} == {64, 128}
    assert lines[-1]["elapsed_s"] >= 0.2
    assert "digits_right" in lines[-1]


def test_what_is_held_out_is_held_out_in_every_folder(tmp_path: Path, small_library: ModuleType) -> None:
    assert all(small_library.held_out(Path(name)) for name in HELD_OUT)
    folder = tmp_path / "package" / "inner"
    folder.mkdir(parents=True)
    for name in ("decoder.py", "kept_apart.py", "tests/learned.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n" * 100)
    assert not small_library.held_out(Path("kept_apart.py"))
    source = small_library.corpus([tmp_path / "package"])[1]
    assert source.train == (b"# kept_apart.py\n" * 100,)
    assert [name for name, _ in source.kept] == ["inner/decoder.py"]


def test_matrices_of_a_shape_are_orthogonalised_as_one_by_one() -> None:
    muon = import_module("muon")
    g = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    together = muon.orthogonalise(g)
    for ours, alone in zip(together, g, strict=True):
        assert_exact(ours, muon.orthogonalise(alone[None])[0])
    # five steps bring all singular values near 1
    assert torch.linalg.svdvals(together).sub(1).abs().max() < 0.35
    # a fused matrix is the sum of its parts: the same step as of two matrices
    torch.manual_seed(1)
    fused, parts = torch.randn(512, 4), []
    parts = [torch.nn.Parameter(part.clone()) for part in fused.split(256)]
    whole, gradient = torch.nn.Parameter(fused), torch.randn(512, 4)
    whole.grad = gradient
    for part, each in zip(parts, gradient.split(256), strict=True):
        part.grad = each.clone()
    for optimiser in (muon.Muon([whole]), muon.Muon(parts)):
        optimiser.param_groups[0]["lr"] = 0.1
        optimiser.step()
    assert_exact(whole.detach(), torch.cat([part.detach() for part in parts]))


def test_batches_weigh_answers_and_jump_below_the_longest_length() -> None:
    batches, stages = import_module("batches"), import_module("stages")
    made = batches.Batches([b"an ordinary line of text\n" * 400], stages.Stage(512, 16, 1), 4096, True, 0)
    tokens, positions, weight = made[3]
    assert tokens.shape == (16, 513)
    assert positions.shape == weight.shape == (16, 512)
    assert positions.max() < 4096
    jumps = positions.diff(dim=1)
    assert (jumps >= 1).all()
    assert 0 < (jumps > 1).any(1).sum() < 16
    heavy = tokens[:, 1:][weight > 1]
    assert len(heavy) > 20
    assert set(bytes(heavy.tolist())) <= set(b"0123456789")
    for ours, again, other in zip(made[3], made[3], made[4], strict=True):
        assert_same_bits(ours, again)
        assert not torch.equal(ours, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 2, "--stages", "512x12"), "stage '512x12': give LENGTHxBATCHxSHARE"),
        (("--steps", 2, "--stages", "8x1x1"), "length of at least 64"),
        (("--steps", 0), "--steps 0, --seconds None: give a positive number"),
        (("--seconds", 3, "--steps", 2), "not allowed with"),
        ((), "one of the arguments"),
        (("--steps", 2, "--heads", 3, "--kv-heads", 2), "--heads 3, --kv-heads 2"),
        (("--steps", 2, "--device", "cuda:7"), "--device cuda:7: torch sees no such device"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [str(word) for word in ("--out", tmp_path, *arguments)]
    with pytest.raises(SystemExit, match="2"):
        import_module("train_reference").main(words)
    assert message in capsys.readouterr().err


def test_a_folder_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no Python files of 512 bytes"):
        train(tmp_path / "out", "--steps", 1, "--source", tmp_path)


def test_held_out_documents_of_the_longest_length_are_enough() -> None:
    documents = held_out_documents(load_reference().max_length, 100)
    assert len(documents) >= 8
    for document in documents:
        assert len(document.data) == 32768
        assert len(document.answer_index) > 200


def test_no_packaged_text_is_a_training_text(monkeypatch: pytest.MonkeyPatch, small_library: ModuleType) -> None:
    texts = PACKAGED.read_bytes().split(b"\f")
    assert [len(text) for text in texts] == list(HELD_OUT.values())
    monkeypatch.undo()
    library = small_library.standard_library()
    assert len(library.train) > 200
    assert not set(texts) & set(library.train)
    # by name, whatever the version of Python
    assert {Path(name).name for name, _ in library.kept} & {Path(name).name for name in HELD_OUT}


def test_the_committed_gate_is_met_at_the_length_the_model_reads() -> None:
    lines = [json.loads(line) for line in (ROOT / "benchmarks/records/reference_gate.jsonl").read_text().splitlines()]
    claims, (exact, dropped) = lines[:2], lines[2:]
    assert [claim["met"] for claim in claims] == [True, True]
    assert exact["length"] == dropped["length"] == load_reference().max_length == 32768
    # the claims are those of the measurements beside them
    assert dropped["bits_per_byte"] - exact["bits_per_byte"] >= 0.05
    assert len(exact["depths"]) == 8
    assert min(depth["share"] for depth in exact["depths"]) >= 0.9
    assert sum(depth["answers"] for depth in exact["depths"]) == exact["answers"] >= 400
    assert not any("+changes" in line["commit"] for line in lines)
