"""Variable tracking: keys that have the value of another key, and so on to one that has a value of its own."""

from hyperattention.evaluation.haystack import hide
from hyperattention.evaluation.item import Item, Turn
from hyperattention.evaluation.tasks.setting import Setting

# keys of a chain
_LINKS = 4


def tracking(setting: Setting) -> tuple[Item, ...]:
    """Hide chains of keys, each of which has the value of the one before, and ask for the value of the last.

    Source: variable tracking of Hsieh et al., 2024 (arXiv:2404.06654), RULER.   Differs: the last key's value is asked for,
    not all keys of a value; the other chains distract, one for every depth.

    Args:
        setting: what for.

    Returns:
        an item a context and chain; its depth is that of the value.
    """
    rng, items, dialect = setting.rng("tracking"), [], setting.haystack.dialect
    for _ in range(setting.contexts):
        num = setting.depths
        keys = dialect.keys(num * _LINKS, rng)
        facts, asked = [], []
        for start in setting.spread(num, rng):
            chain, value = [keys.pop() for _ in range(_LINKS)], dialect.value(rng)
            # links follow the value in their order, anywhere behind it
            depths = sorted(start + (1 - start) * rng.random() for _ in chain[1:])
            facts.append((start, dialect.fact(chain[0], value)))
            links = zip(depths, chain[1:], chain[:-1], strict=True)
            facts += [(depth, dialect.link(key, other)) for depth, key, other in links]
            asked.append(Turn(dialect.question(chain[-1]), (value,), (start,), dialect.answer_size((value,))))
        context = hide(facts, setting.context, setting.haystack, rng)
        items += [Item("tracking", setting.length, context, (turn,)) for turn in asked]
    return tuple(items)
