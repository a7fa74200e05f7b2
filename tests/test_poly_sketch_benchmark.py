"""The benchmark of polynomial attention: its shares of pairs, its tables, and a training that resumes."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    pytest.importorskip("matplotlib")
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    import poly_sketch
    import poly_sketch_table

    yield poly_sketch, poly_sketch_table
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if str(Path(getattr(sys.modules[name], "__file__", None) or "/").parent) in (
            str(BENCHMARKS), str(BENCHMARKS.parent / "training"),
        ):  # fmt: skip
            del sys.modules[name]


def time_of(name: str, length: int, microseconds: float) -> dict:
    return {"part": "forward", "attention": name, "length": length, "microseconds_a_token": microseconds, "seconds": [1.0],
            "computed_s": [length * microseconds * x for x in (1, 2, 9)],
            "width": 8, "heads": 1, "sketch": 4, "block": 4, "commit": "c" * 40, "device": "cpu", "threads": 1,
            "versions": {"torch": "2"}}  # fmt: skip


def test_shares_are_those_of_pairs_within_blocks(scripts):
    i = torch.arange(23)
    for block in (1, 5, 23, 40):
        seen = i[:, None] >= i
        same = (i[:, None] // block == i // block) & seen
        assert scripts[0].share_of_pairs(23, block) == pytest.approx(same.sum().item() / seen.sum().item())


def test_times_that_grow_are_marked_for_sketches_alone(scripts):
    grown = {"softmax": 2.0, "learned sketch": 1.14, "random sketch": 1.16}
    records = [time_of(name, n, 5 * (ratio if n == 8 else 1)) for name, ratio in grown.items() for n in (4, 8)]
    table = scripts[1].times_table(records)
    assert "| forward | largest / smallest | 2.00x | 1.14x | 1.16x (**missed**) |" in table
    assert (
        "| 8 / 4, within a round | 2.00x (2.00 to 2.00) | 1.14x (1.14 to 1.14) | 1.16x (1.16 to 1.16) (**missed**) |"
        in table
    )


def test_losses_are_compared_seed_by_seed_and_the_longest_training_is_shown(scripts):
    size = {"layers": 1, "width": 8, "heads": 1, "steps": 4, "batch": 1, "length": 8, "sketch": 2, "block": 4}

    def run(name: str, seed: int, loss: float, steps: int = 4) -> dict:
        return time_of(name, 8, 0.0) | {"part": "training", "seed": seed, "held_out": loss, "parameters": 1000,
                                        "share_of_pairs": 0.5, "size": size | {"steps": steps}}  # fmt: skip

    runs = [run("softmax", 0, 2.0), run("softmax", 1, 3.0), run("learned sketch", 1, 3.5), run("learned sketch", 0, 2.5)]
    table = scripts[1].training_table([run("softmax", 0, 9.0, steps=3), *runs])
    assert "| learned sketch | 1,000 | 2 | 3.000 ± 0.500 | +0.500 ± 0.000 | 50.0 % |" in table
    assert "9.0" not in table


def test_nothing_recorded_gives_the_command(scripts):
    assert "poly_sketch.py train" in scripts[1].training_table([])
    assert "poly_sketch.py time" in scripts[1].times_table([])


def test_a_training_resumes_where_it_stopped(scripts, tmp_path, monkeypatch):
    model = sys.modules["poly_sketch_model"]
    texts = model.Texts([bytes(range(256)) * 4], [bytes(reversed(range(256))) * 4])
    monkeypatch.setattr(model.Texts, "read", staticmethod(lambda: texts))
    out = tmp_path / "records.jsonl"
    scripts[0].train(scripts[0].TOY, out, ["softmax", model.CONTROL])
    first = out.read_text()
    scripts[0].train(scripts[0].TOY, out, ["softmax", model.CONTROL])
    assert out.read_text() == first
    records = [json.loads(line) for line in first.splitlines()]
    assert [(r["attention"], r["seed"]) for r in records] == [(n, s) for s in (0, 1) for n in ("softmax", model.CONTROL)]
    assert all(0 < r["held_out"] < 7 and len(r["losses"]) == 4 for r in records)
    assert [r["share_of_pairs"] < 1 for r in records] == [False, True] * 2
