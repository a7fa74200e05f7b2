"""What the evaluation of caches asks, and how answers and losses are counted."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from hyperattention.evaluation.continuation import Loss, Texts, added, pieces
from hyperattention.evaluation.dialect import Lines
from hyperattention.evaluation.families import EXACT, choose_families
from hyperattention.evaluation.haystack import Haystack, hide
from hyperattention.evaluation.item import Item, Turn
from hyperattention.evaluation.policies import CacheCandidate, candidates_at
from hyperattention.evaluation.score import Share, marks
from hyperattention.evaluation.sentences import Sentences
from hyperattention.evaluation.tasks import TASKS
from hyperattention.evaluation.tasks.setting import Setting
from hyperattention.reference.text import held_out_text


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack.of(held_out_text()[:60_000].decode("latin-1"), Lines())


@pytest.fixture(scope="module")
def sentences() -> Haystack:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # a token for every byte: what is asked reads as it was written
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = held_out_text()[:60_000].decode(errors="replace")
    return Haystack.of(text, Sentences(PreTrainedTokenizerFast(tokenizer_object=tokenizer)))


@pytest.mark.parametrize("dialect", ["haystack", "sentences"])
@pytest.mark.parametrize("task", TASKS)
def test_items_are_whole_and_facts_lie_where_they_are_said_to(
    task: str, dialect: str, request: pytest.FixtureRequest
) -> None:
    straw = request.getfixturevalue(dialect)
    setting = Setting(straw, 8192, depths=4, contexts=1, seed=1)
    items = TASKS[task](setting)
    seen = set()
    for item in items:
        asked = [straw.dialect.encode(turn.question) for turn in item.turns]
        answered = sum(turn.answer_size for turn in item.turns)
        assert len(item.context) == setting.context
        assert len(item.context) + sum(map(len, asked)) + answered <= item.length == 8192
        text = straw.dialect.decode(item.context)
        for turn in item.turns:
            assert turn.answer_size >= sum(len(straw.dialect.encode(answer)) for answer in turn.answers)
            for answer, depth in zip(turn.answers, turn.depths, strict=True):
                told = [place for place in range(len(text)) if text.startswith(answer, place)]
                # a fact moves to the end of its line
                assert min(abs(place / len(text) - depth) for place in told) < 0.06
                seen.add(int(4 * depth))
    assert seen == {0, 1, 2, 3}
    assert TASKS[task](setting) == items
    assert TASKS[task](Setting(straw, 8192, depths=4, contexts=1, seed=2)) != items


def test_the_key_that_is_asked_for_is_told_once(haystack: Haystack) -> None:
    for item in TASKS["multi-key"](Setting(haystack, 4096)):
        (turn,) = item.turns
        key = turn.question.removeprefix("\n#get ").removesuffix("=")
        text = haystack.dialect.decode(item.context)
        assert text.count(f"#set {key}=") == 1
        assert f"#set {key}={turn.answers[0]}\n" in text


def test_a_key_of_several_values_is_told_with_each(haystack: Haystack) -> None:
    for item in TASKS["multi-value"](Setting(haystack, 4096)):
        (turn,), text = item.turns, haystack.dialect.decode(item.context)
        key = turn.question.removeprefix("\n#get ").removesuffix("=")
        assert text.count(f"#set {key}=") == len(turn.answers) == 4
        assert all(f"#set {key}={answer}\n" in text for answer in turn.answers)


def test_a_chain_leads_from_the_key_asked_for_to_the_value(haystack: Haystack) -> None:
    for item in TASKS["tracking"](Setting(haystack, 4096)):
        (turn,), text = item.turns, haystack.dialect.decode(item.context)
        name, hops = turn.question.removeprefix("\n#get ").removesuffix("="), 0
        while name.isalpha():
            (_, _, after), hops = text.partition(f"#set {name}="), hops + 1
            name = after.partition("\n")[0]
        assert (name, hops) == (turn.answers[0], 4)


def test_facts_that_do_not_fit_are_refused(haystack: Haystack) -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="3 facts need 42 tokens"):
        hide([(0.5, "#set abc=1234\n")] * 3, 41, haystack, rng)
    with pytest.raises(ValueError, match="give a longer text"):
        hide([], len(haystack.tokens) + 1, haystack, rng)
    with pytest.raises(ValueError, match="give more than 128"):
        TASKS["single"](Setting(haystack, 128))


def test_answers_are_marked_one_by_one() -> None:
    turns = (Turn("?", ("1234", "5678"), (0.1, 0.9), 9), Turn("?", ("4321",), (0.5,), 4))
    item = Item("made", 10, (0,), turns)
    found = marks(item, ("1234, 5670", "4391"))
    assert [(mark.right, mark.digits, mark.depth) for mark in found] == [
        (True, 1, 0.1),
        (False, 0.75, 0.9),
        (False, 0.75, 0.5),
    ]
    assert [mark.right for mark in marks(item, ("56781234", " 4321\n"))] == [True, True, True]
    assert [mark.digits for mark in marks(item, ("", "----"))] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_the_interval_is_wilsons(right: int, total: int, low: float, high: float) -> None:
    # a table gives four digits
    assert Share(right, total).interval == pytest.approx((low, high), abs=5e-5)


def test_seeds_read_other_texts_until_there_are_none(haystack: Haystack) -> None:
    texts, tokens = Texts(1000, continuation=100, documents=4), range(9_999)
    numbers = [list(pieces(tokens, texts, seed)) for seed in range(3)]
    assert len({*numbers[0], *numbers[1]}) == 8
    assert len({*numbers[0], *numbers[1], *numbers[2]}) == 9
    assert all(
        part == tuple(range(1000 * number, 1000 * number + 1000)) for number, part in pieces(tokens, texts, 0).items()
    )
    with pytest.raises(ValueError, match="give a longer text"):
        pieces(range(999), texts, 0)
    with pytest.raises(ValueError, match="give a greater length"):
        Texts(100, continuation=100)


def test_texts_that_several_seeds_read_count_once() -> None:
    who = CacheCandidate(EXACT, 256)
    losses = [Loss(who, *each, 0, 0) for each in ((0, 0, 1.0, 0.2), (0, 1, 1.0, 0.4), (1, 0, 2.0, 0.5))]
    pooled = added(losses)
    assert (pooled.nats, pooled.texts) == (pytest.approx(0.4), 2)
    assert pooled.error == pytest.approx(0.1)
    assert added(losses[:2]).error is None


def test_baselines_always_take_part_and_unknown_names_do_not() -> None:
    names = [each.name for each in choose_families(())]
    assert names == ["exact", "streaming", "uniform", "random"]
    assert [each.name for each in choose_families(None)][:4] == names
    with pytest.raises(ValueError, match="unknown policies nonsense: choose from exact, streaming"):
        choose_families(("uniform", "nonsense"))
    with pytest.raises(ValueError, match="budget=20 leaves no slot"):
        candidates_at(choose_families(()), (20,))
