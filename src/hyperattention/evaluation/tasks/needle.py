"""Needles in a haystack: one fact, or one of many, is asked for."""

import random

from hyperattention.evaluation.haystack import hide
from hyperattention.evaluation.item import Item, Turn
from hyperattention.evaluation.tasks.setting import Setting

# tokens of context for each distracting fact: as many as the reference model was trained with
_TOKENS_PER_KEY = 128


def single(setting: Setting) -> tuple[Item, ...]:
    """Hide one fact, at every depth in turn, in a context of its own.

    Source: the single needle of Hsieh et al., 2024 (arXiv:2404.06654), RULER.   Differs: the words.

    Args:
        setting: what for.

    Returns:
        an item a context and depth.
    """
    rng, items = setting.rng("single"), []
    for _ in range(setting.contexts):
        for depth in setting.spread(setting.depths, rng):
            items += _asked_one_by_one("single", [depth], setting, rng)
    return tuple(items)


def multi_key(setting: Setting) -> tuple[Item, ...]:
    """Hide many facts of the same form, and ask for each: all others distract.

    Source: the multi-key needle of Hsieh et al., 2024 (arXiv:2404.06654), RULER.   Differs: every key is asked for, so that
    one reading of a context answers many items.

    Args:
        setting: what for.

    Returns:
        an item a context and key, with keys at every depth.
    """
    rng, items = setting.rng("multi-key"), []
    num = max(setting.depths, setting.length // _TOKENS_PER_KEY)
    for _ in range(setting.contexts):
        items += _asked_one_by_one("multi-key", setting.spread(num, rng), setting, rng)
    return tuple(items)


def _asked_one_by_one(task: str, depths: list[float], setting: Setting, rng: random.Random) -> list[Item]:
    dialect = setting.haystack.dialect
    told = [(depth, key, dialect.value(rng)) for depth, key in zip(depths, dialect.keys(len(depths), rng), strict=True)]
    facts = [(depth, dialect.fact(key, value)) for depth, key, value in told]
    context = hide(facts, setting.length, setting.haystack, rng)
    return [
        Item(task, context, (Turn(dialect.question(key), (value,), dialect.answer_size((value,))),), depth)
        for depth, key, value in told
    ]
