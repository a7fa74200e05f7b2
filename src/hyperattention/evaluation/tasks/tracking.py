"""Variable tracking: chains of keys, in which each key has the value of the key before, and the first key has a value."""

from hyperattention.evaluation.haystack import hide
from hyperattention.evaluation.item import Item, Turn
from hyperattention.evaluation.tasks.setting import Setting

# keys of a chain
_LINKS = 4


def tracking(setting: Setting) -> tuple[Item, ...]:
    """Hide chains of keys, in which each key has the value of the key before, and ask for the value of the last key.

    Source: variable tracking of Hsieh et al., 2024 (arXiv:2404.06654), RULER.   Differs: the question asks for the value
    of the last key, not for all keys of a value; the other chains are distractors, with one chain for every depth.

    Args:
        setting: the text, the length and the numbers of contexts and depths.

    Returns:
        one item for each context and chain; the depth of an item is that of the value.
    """
    rng, items, dialect = setting.rng("tracking"), [], setting.haystack.dialect
    for _ in range(setting.contexts):
        num = setting.depths
        keys = dialect.keys(num * _LINKS, rng)
        facts, asked = [], []
        for start in setting.spread(num, rng):
            chain, value = [keys.pop() for _ in range(_LINKS)], dialect.value(rng)
            # the links are at random places after the value, in the order of the chain
            depths = sorted(start + (1 - start) * rng.random() for _ in chain[1:])
            facts.append((start, dialect.fact(chain[0], value)))
            links = zip(depths, chain[1:], chain[:-1], strict=True)
            facts += [(depth, dialect.link(key, other)) for depth, key, other in links]
            asked.append(Turn(dialect.question(chain[-1]), (value,), (start,), dialect.answer_size((value,))))
        context = hide(facts, setting.context, setting.haystack, rng)
        items += [Item("tracking", setting.length, context, (turn,)) for turn in asked]
    return tuple(items)
