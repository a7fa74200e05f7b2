"""Two processes that hold one kv head each answer as one process does."""

from engines import prompt_of, run_engines
from test_engine import BY_PLACE, case, difference, loss_of


def test_two_processes_draw_for_their_heads_as_one_would(llama):
    pages = {"budget": 64, "sinks": 4, "window": 16, "min_length": 64}
    options = {"method": BY_PLACE, "min_length": 64, "decode": pages}
    asked = case(llama, [[prompt_of(700, 1)]], options, {"max_tokens": 8, "prompt_logprobs": 1})
    one, two = (run_engines([asked | {"llm": asked["llm"] | {"tensor_parallel_size": size}}])[0] for size in (1, 2))
    assert one["approximated"] == 2
    assert one["decoding"]["calls"] == 2 * 7
    for approximated, listed, exact, decoded in two["ranks"]:
        assert (approximated, decoded) == (2, 2 * 7)
        # half of the query heads each
        assert 2 * listed == one["listed_pairs"]
        assert listed < exact / 2
    assert len(two["ranks"]) == 2
    assert two["tokens"] == one["tokens"]
    # float32 sums of other orders, two layers deep; another draw in one head would change the loss of a token by far more
    assert difference(loss_of(one), loss_of(two)) < 2e-4
