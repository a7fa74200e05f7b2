"""The options of decoding by the best pages: what a step reads, from which length on, and how much memory it may take."""

from dataclasses import dataclass, field

from hyperattention.cache.budget import CacheBudget
from hyperattention.files.fields import Field
from hyperattention.files.policy_table import policy_from_json
from hyperattention.kernels.decode.page_plan import PagePlan
from hyperattention.policies.top_pages import TopPages

_KNOWN = ("policy", "budget", "sinks", "window", "min_length", "memory_gib")
# a shorter request is decoded exactly: on a CPU 1,024 chosen keys take about as long as 18,000 in order
_LEAST_KEYS = 20_480
_LEAST_BUDGETS = 8


@dataclass(frozen=True)
class DecodeOptions:
    """How requests that generate are approximated, checked.

    Args:
        budget: number of keys that a step reads, and the sinks and the window among them. Sinks are rounded up to pages.
        policy: size of a page, and how pages are ranked.
        min_length: number of keys from which on a request is approximated; None for 20,480, or eight
            budgets if they are more.
        memory_gib: most memory of the summaries of all layers in one process, in GiB.
    """

    budget: CacheBudget
    policy: TopPages = field(default_factory=TopPages)
    min_length: int | None = None
    memory_gib: float = 4.0

    @property
    def least(self) -> int:
        """Number of keys from which on a request is approximated."""
        if self.min_length is not None:
            return self.min_length
        return max(_LEAST_KEYS, _LEAST_BUDGETS * self.budget.budget)

    def plan(self, keys: int) -> PagePlan:
        """Say what the query of the last key reads.

        Args:
            keys: number of keys of its request.

        Returns:
            whole pages of sinks, chosen pages, and the window from the edge of a page on; no key is in two of them.
        """
        page, room = self.policy.page, self.budget
        recent = max(0, keys - 1 - room.window) // page * page
        sinks = min(-(-room.sinks // page) * page, recent)
        most = max(1, (room.budget - sinks - room.window - page) // page)
        return PagePlan(page, sinks, recent, keys, min(most, (recent - sinks) // page))


def read_decode(whole: Field) -> DecodeOptions | None:
    """Read the option `decode`.

    Args:
        whole: its value: "exact", or an object.

    Returns:
        the options; None for exact decoding. A wrong value raises a ValueError that names the rule and the remedy.
    """
    if whole.value == "exact":
        return None
    if not isinstance(whole.value, dict) or "budget" not in whole.value:
        whole.refuse('it must be "exact", or an object such as {"budget": 1024} to decode by the best pages')
    found = whole.parts()
    for name in found:
        if name not in _KNOWN:
            found[name].refuse(f"no such option of decoding is known, only {', '.join(_KNOWN)}")
    policy = _read_policy(found["policy"]) if "policy" in found else TopPages()
    sizes = {name: found[name].whole() for name in ("sinks", "window") if name in found}
    keys = found["budget"].whole(1)
    try:
        budget = CacheBudget(keys, **sizes)
        # the policy's own check that a page fits
        policy.store(budget, 0, 0, None)
    except ValueError as error:
        whole.refuse(str(error))
    return DecodeOptions(
        budget,
        policy,
        found["min_length"].whole() if "min_length" in found else None,
        found["memory_gib"].number() if "memory_gib" in found else DecodeOptions.memory_gib,
    )


def _read_policy(field: Field) -> TopPages:
    policy = policy_from_json(field)
    if not isinstance(policy, TopPages):
        field.refuse("vLLM keeps every key, and only TopPages does so too: use TopPages")
    if policy.draws or policy.share != 1:
        field.refuse("in vLLM every layer chooses its own pages and nothing is drawn: leave `draws` and `share` out")
    return policy
