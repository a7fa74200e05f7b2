"""Line retrieval: a context that contains only facts."""

from hyperattention.evaluation.item import Item, Turn
from hyperattention.evaluation.tasks.setting import Setting

# number of different keys that every dialect can draw
_MOST = 17_000


def line_retrieval(setting: Setting) -> tuple[Item, ...]:
    """Fill the context with facts, one in each line, and ask for one fact at every depth.

    Source: the line retrieval of LongEval (Li et al., 2023, LongChat), on which Zandieh et al., 2024 (arXiv:2402.06082)
    evaluate caches.   Differs: the words; questions about lines at every depth; the rest of the context after the last
    line is ordinary text.

    Args:
        setting: the text, the length and the numbers of contexts and depths.

    Returns:
        one item for each context and depth.
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
