"""Line retrieval: a context of nothing but facts, the hardest haystack for a fact."""

from hyperattention.evaluation.item import Item, Turn
from hyperattention.evaluation.tasks.setting import Setting

# keys that every dialect has
_MOST = 17_000


def line_retrieval(setting: Setting) -> tuple[Item, ...]:
    """Fill the context with facts, one a line, and ask for some at every depth.

    Source: the line retrieval of LongEval (Li et al., 2023, LongChat), on which Zandieh et al., 2024 (arXiv:2402.06082)
    judge caches.   Differs: the words; lines are asked for at every depth; what is left at the end of the context is
    ordinary text.

    Args:
        setting: what for.

    Returns:
        an item a context and depth.
    """
    rng, items, dialect = setting.rng("lines"), [], setting.haystack.dialect
    for _ in range(setting.contexts):
        whole, lines = list(dialect.preamble), []
        # no line is shorter than one token
        for key in dialect.keys(min(setting.context, _MOST), rng):
            value = dialect.value(rng)
            words = dialect.encode(dialect.fact(key, value))
            if len(whole) + len(words) > setting.context:
                break
            lines.append((len(whole) / setting.context, key, value))
            whole += words
        context = (*whole, *setting.haystack.piece(setting.context - len(whole), rng).tokens)
        for number in range(setting.depths):
            own = [line for line in lines if int(line[0] * setting.depths) == number]
            if own:
                depth, key, value = rng.choice(own)
                turn = Turn(dialect.question(key), (value,), (depth,), dialect.answer_size((value,)))
                items.append(Item("lines", setting.length, context, (turn,)))
    return tuple(items)
