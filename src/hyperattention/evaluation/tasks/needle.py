"""Needles in a haystack: facts hidden in ordinary text, and questions about one or several of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hyperattention.evaluation.haystack import hide
from hyperattention.evaluation.item import Item, Turn
from hyperattention.evaluation.tasks.setting import Setting

# tokens of context for each distracting fact, as in the training of the reference model
_TOKENS_PER_KEY = 128
# values of one key, and keys of one item
_SEVERAL = 4


@dataclass(frozen=True)
class _Fact:
    depth: float
    key: str
    value: str


def single(setting: Setting) -> tuple[Item, ...]:
    """Hide one fact in each context, at every depth in turn.

    Source: the single needle of Hsieh et al., 2024 (arXiv:2404.06654), RULER.   Differs: the words.

    Args:
        setting: the text, the length and the numbers of contexts and depths.

    Returns:
        one item for each context and depth.
    """
    rng, items = setting.rng("single"), []
    for _ in range(setting.contexts):
        for depth in setting.spread(setting.depths, rng):
            facts = _told([depth], setting, rng)
            items += _items("single", [facts], _hidden(facts, setting, rng), setting)
    return tuple(items)


def multi_key(setting: Setting) -> tuple[Item, ...]:
    """Hide many facts of the same form, and ask for each of them; the others are distractors.

    Source: the multi-key needle of Hsieh et al., 2024 (arXiv:2404.06654), RULER.   Differs: there is a question for every
    key, so one reading of a context answers many items.

    Args:
        setting: the text, the length and the numbers of contexts and depths.

    Returns:
        one item for each context and key, with keys at every depth.
    """
    rng, items = setting.rng("multi-key"), []
    for _ in range(setting.contexts):
        facts = _told(setting.spread(_num_keys(setting), rng), setting, rng)
        items += _items("multi-key", [[fact] for fact in facts], _hidden(facts, setting, rng), setting)
    return tuple(items)


def multi_query(setting: Setting) -> tuple[Item, ...]:
    """Hide many facts of the same form, and ask for several of them one after another, each followed by its answer.

    Source: the multi-query needle of Hsieh et al., 2024 (arXiv:2404.06654), RULER.   Differs: one turn for each key, so
    the cache of later questions also contains earlier questions and answers.

    Args:
        setting: the text, the length and the numbers of contexts and depths.

    Returns:
        items of four keys each, at different depths.
    """
    rng, items = setting.rng("multi-query"), []
    for _ in range(setting.contexts):
        num = max(_SEVERAL, _num_keys(setting) // _SEVERAL * _SEVERAL)
        facts = _told(setting.spread(num, rng), setting, rng)
        # item i asks for facts a quarter of the context apart, in a random order
        groups = [rng.sample(facts[first :: num // _SEVERAL], _SEVERAL) for first in range(num // _SEVERAL)]
        items += _items("multi-query", groups, _hidden(facts, setting, rng), setting)
    return tuple(items)


def multi_value(setting: Setting) -> tuple[Item, ...]:
    """Hide several values of one key, and ask for all of them; other keys with several values are distractors.

    Source: the multi-value needle of Hsieh et al., 2024 (arXiv:2404.06654), RULER.   Differs: one context contains a key
    for every depth.

    Args:
        setting: the text, the length and the numbers of contexts and depths.

    Returns:
        one item for each context and key.
    """
    rng, items, dialect = setting.rng("multi-value"), [], setting.haystack.dialect
    for _ in range(setting.contexts):
        num = setting.depths
        facts = _told(setting.spread(num * _SEVERAL, rng), setting, rng)
        facts = [_Fact(fact.depth, facts[place % num].key, fact.value) for place, fact in enumerate(facts)]
        context = _hidden(facts, setting, rng)
        for first in range(num):
            own = facts[first::num]
            values, depths = tuple(fact.value for fact in own), tuple(fact.depth for fact in own)
            turn = Turn(dialect.question(own[0].key, _SEVERAL), values, depths, dialect.answer_size(values))
            items.append(Item("multi-value", setting.length, context, (turn,)))
    return tuple(items)


def _num_keys(setting: Setting) -> int:
    return max(setting.depths, setting.length // _TOKENS_PER_KEY)


def _told(depths: Sequence[float], setting: Setting, rng: random.Random) -> list[_Fact]:
    dialect = setting.haystack.dialect
    return [_Fact(depth, key, dialect.value(rng)) for depth, key in zip(depths, dialect.keys(len(depths), rng), strict=True)]


def _hidden(facts: Sequence[_Fact], setting: Setting, rng: random.Random) -> tuple[int, ...]:
    words = [(fact.depth, setting.haystack.dialect.fact(fact.key, fact.value)) for fact in facts]
    return hide(words, setting.context, setting.haystack, rng)


def _items(task: str, groups: Sequence[Sequence[_Fact]], context: tuple[int, ...], setting: Setting) -> list[Item]:
    """Make one item for each group of facts, with one turn for each fact."""
    dialect = setting.haystack.dialect

    def turn(fact: _Fact) -> Turn:
        return Turn(dialect.question(fact.key), (fact.value,), (fact.depth,), dialect.answer_size((fact.value,)))

    return [Item(task, setting.length, context, tuple(map(turn, group))) for group in groups]
