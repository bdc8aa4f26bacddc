"""Where the scores of a token rule come from: which site is observed for a pruned one, and at which of its steps.

Runtime and cost model both ask here: a statistic is taken only where a later P cell reads it, and only that is charged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schedule import Plan

OBSERVED = {  # base of a token rule -> kind of the site whose attention it is a statistic of
    "attention_received": "attn",
    "value_norm": "attn",
    "cross_attention_entropy": "cross_attn",
}
MAPPED = ("attention_received", "cross_attention_entropy")  # those that need the attention weights themselves


def source_of(plan: Plan, site: str, base: str) -> str | None:
    """Returns the site in the block of `site` that `base` is observed at; None where the block has none of its kind."""
    block = site.split(".")[:2]
    for key in plan.rows:
        if key.split(".")[:2] == block and plan.kind(key) == OBSERVED[base]:
            return key
    return None


def chooses(plan: Plan, site: str, step: int) -> bool:
    """Whether the site has to choose among its tokens at `step`: a P cell of neither none nor all of them."""
    if plan.rows[site][step] != "P":
        return False
    return 0 < plan.k[site][plan.cell(site, step, "P")] < plan.tokens(site)


def observed_steps(plan: Plan, base: str) -> dict[str, frozenset[int]]:
    """Returns, for each site that scores are taken from, the steps (C or P) at which its statistic has to be taken."""
    if base not in OBSERVED:
        return {}
    order = {key: i for i, key in enumerate(plan.rows)}
    readers: dict[str, list[str]] = {}
    for site, row in plan.rows.items():
        source = source_of(plan, site, base) if "P" in row else None
        if source is not None:
            readers.setdefault(source, []).append(site)
    return {source: _observed(plan, source, sites, order) for source, sites in readers.items()}


def _observed(plan: Plan, source: str, readers: list[str], order: dict[str, int]) -> frozenset[int]:
    row, steps = plan.rows[source], set()
    wanted = False  # whether a later cell reads what stands now, before all of it is taken anew
    for step in reversed(range(len(row))):
        reading = [site for site in readers if chooses(plan, site, step)]
        after = any(order[site] > order[source] for site in reading)
        before = any(order[site] <= order[source] for site in reading)
        writes = row[step] == "C" or (row[step] == "P" and plan.k[source][plan.cell(source, step, "P")] > 0)
        if writes and (wanted or after):
            steps.add(step)
        wanted = before or (row[step] != "C" and (wanted or after))
    return frozenset(steps)
