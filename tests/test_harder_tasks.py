"""Documents of harder tasks ask for what they say; a pass counts whole answers; tables say what was left out."""

import random
import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from hyperattention.methods.base import Cost
from hyperattention.reference.passes import Pass, digits_right
from hyperattention.reference.text import held_out_text

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LENGTH = 4096
TASKS = ("twice", "digits", "letters", "multi-query", "lines", "multi-value", "tracking")
WOVEN = TASKS[:3]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    # other scripts have modules of the same names
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def document(task: str, seed: int = 0):
    made = import_module("harder_documents").DOCUMENTS
    assert tuple(made) == TASKS
    return made[task](held_out_text()[:LENGTH], LENGTH, random.Random(seed))


def read_with(found, wrong: tuple[int, ...] = ()) -> Pass:
    """Make the pass of a model that predicts every token but those at some places."""
    sample = found.sample()
    targets = sample.tokens[1:]
    logits = torch.nn.functional.one_hot(targets, 256).float()
    logits[[place - 1 for place in wrong]] *= -1
    right = digits_right(logits, targets, sample)
    return Pass(1.0, 2, 3.0, int(sample.planted.sum()), right, sample.answer_distance, 1.0, 1.0, (), 4, 4)


@pytest.mark.parametrize("task", TASKS)
def test_every_question_asks_for_a_fact_that_was_set_so_far_back(task):
    found = document(task)
    assert len(found.data) == LENGTH if task in WOVEN else LENGTH * 0.6 < len(found.data) <= LENGTH
    for answer in found.answers:
        asked = found.data.rindex(b"#get ", 0, answer.first)
        key, value = found.data[asked + 5 : asked + 8], found.data[answer.first : answer.first + answer.size]
        # a letter after the first stands behind other letters of the answer
        begun = found.data[asked + 9 : answer.first + answer.size]
        back = found.data[: answer.first - answer.distance + answer.size]
        if task == "tracking":
            assert b"=" + value + b"\n" in found.data[:asked]
            continue
        assert back.endswith(b"#set " + key + b"=" + begun)
        assert task == "multi-value" or found.data.count(b"#set " + key + b"=") == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_the_document(task):
    assert document(task, 1) == document(task, 1) != document(task, 2)


def test_facts_are_asked_twice():
    groups = Counter(answer.group for answer in document("twice").answers)
    assert groups == {"first time": LENGTH // 128, "second time": LENGTH // 128}
    found = document("twice")
    asked = Counter(found.data[answer.first - 9 : answer.first] for answer in found.answers)
    assert set(asked.values()) == {2}


@pytest.mark.parametrize(("task", "asked"), [("digits", 1), ("letters", 0)])
def test_answers_have_one_to_eight_characters(task, asked):
    found = document(task)
    many = LENGTH // 128 // 8
    if asked:
        assert Counter(answer.size for answer in found.answers) == dict.fromkeys(range(1, 9), many)
    else:
        # all but the first of each
        assert len(found.answers) == many * sum(range(8))
        assert all(answer.size == 1 for answer in found.answers)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_counts_text_apart_from_answers(task):
    found = document(task)
    sample, half = found.sample(), len(found.data) // 2
    text = bytes(sample.tokens[1:][sample.counted].tolist())
    assert b"#set" not in text
    assert b"#get" not in text
    assert not sample.counted[: half - 1].any()
    assert sample.num_bytes == len(text)
    asked = {place for answer in found.answers for place in range(answer.first, answer.first + answer.size)}
    assert set((sample.planted.nonzero()[:, 0] + 1).tolist()) == asked
    # the facts of the other tasks fill most of a short document
    if task in (*WOVEN, "multi-query"):
        assert len(text) > half // 3


def test_an_answer_is_right_if_all_its_characters_are():
    harder, found = import_module("harder_tasks"), document("digits")
    whole = harder.shares(found.answers, read_with(found))
    assert all(right == asked > 0 for right, asked in whole["groups"].values())
    assert sum(asked for _, asked in whole["depths"]) == len(found.answers)
    four = next(answer for answer in found.answers if answer.size == 4)
    for place in range(four.first, four.first + 4):
        groups = harder.shares(found.answers, read_with(found, (place,)))["groups"]
        assert groups == whole["groups"] | {"4 digits": [3, 4]}
    # the token after an answer is not part of it
    assert harder.shares(found.answers, read_with(found, (four.first - 1, four.first + 4))) == whole


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("default", {"approximated": 3}, "answered 3 of 4 calls"),
        ("control", {"approximated": 0, "calls": 0}, "answered 0 of 0 calls"),
        ("thorough", {}, "lists"),
    ],
)
def test_a_pass_that_does_not_approximate_is_refused(monkeypatch, name, change, message):
    harder, found = import_module("harder_tasks"), document("twice")
    done = replace(read_with(found), **change)
    monkeypatch.setattr(harder, "run_pass", lambda *_, **__: done)
    if not change:
        monkeypatch.setattr(harder.Row, "cost", lambda *_: Cost(9.0, 0.0, 9.0, 1, True))
    with pytest.raises(AssertionError, match=message):
        harder.measure(None, found, name, 0, 0)
    # exact attention claims nothing
    assert harder.measure(None, found, "exact", 0, 0)["nats_per_byte"] == 0.5


def test_a_context_of_facts_has_no_loss_of_text(monkeypatch):
    harder = import_module("harder_tasks")
    for task, expected in (("lines", None), ("twice", 0.5)):
        found = document(task)
        monkeypatch.setattr(harder, "run_pass", lambda *_, found=found, **__: read_with(found))
        assert harder.measure(None, found, "exact", 0, 0)["nats_per_byte"] == expected


def record(task: str, name: str, groups: dict, nats: float | None = 0.5, number: int = 0) -> dict:
    return {
        "task": task,
        "name": name,
        "document": number,
        "groups": groups,
        "nats_per_byte": nats,
        "nats_per_character": 0.25,
    }


def test_the_tables_leave_out_what_exact_attention_cannot_answer():
    harder, table = import_module("harder_tasks"), import_module("harder_tasks_table")
    exact = record("digits", "exact", {"4 digits": [18, 20], "5 digits": [11, 20]})
    assert harder.possible(exact)
    assert not harder.possible(record("tracking", "exact", {"tracking": [11, 20]}))
    text = table.tables(
        [
            exact,
            record("digits", "default", {"4 digits": [15, 20], "5 digits": [0, 20]}, 0.75),
            record("lines", "exact", {"lines": [10, 10]}, None),
            record("lines", "default", {"lines": [5, 10]}, None),
            # no pass of exact attention on this document
            record("lines", "default", {"lines": [0, 10]}, None, number=1),
            record("digits", "exact", {"4 digits": [18, 20], "5 digits": [0, 20]}, number=1),
            record("tracking", "exact", {"tracking": [1, 32]}),
        ]
    )
    judged, losses, dropped = text.split("\n\n")
    assert "| digits: 4 digits | 40 | 90.0 % | 75.0 % (-15.0), of 20 |" in judged
    assert "| lines | 10 | 100.0 % | 50.0 % (-50.0) |" in judged
    assert "5 digits" not in judged
    assert "| digits | +0.2500; +0.0000 (1 x 1) |" in losses
    assert "no text; +0.0000" in losses
    assert "tracking" not in losses
    assert "| digits: 5 digits | 40 | 27.5 % |" in dropped
    assert "| tracking | 32 | 3.1 % |" in dropped


def test_a_finished_part_of_the_caches_is_not_measured_again(tmp_path):
    parts = import_module("cache_quality").Parts
    path = tmp_path / "parts.pickle"
    assert parts(path).get(("task", 1), lambda: iter([1, 2])) == [1, 2]
    assert parts(path).get(("task", 1), lambda: pytest.fail("measured again")) == [1, 2]
    assert parts(path).get(("task", 2), lambda: [3]) == [3]
    assert parts(None).get(("task", 1), lambda: [4]) == [4]
