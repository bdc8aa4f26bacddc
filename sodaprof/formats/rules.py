"""Whether a schedule is legal: rules that need only the file. Each rule is one function; `RULES` holds all of them.

Whether a schedule matches a pipeline (class, fingerprint, sites, timesteps, guidance) is checked by the runtime. The second
half of the file says which attention a token rule reads, and at which steps it has to be recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import IllegalScheduleError
from .schedule import Forecast, Plan, Schedule
from .sites import SiteKey

BASES = ("feature_mean", "attention_received", "cross_attention_entropy", "value_norm", "random")
MAX_SOURCES = 4
OBSERVED = {  # base of a token rule -> kind of the site whose attention it is a statistic of
    "attention_received": "attn",
    "value_norm": "attn",
    "cross_attention_entropy": "cross_attn",
}
MAPPED = ("attention_received", "cross_attention_entropy")  # those that need the attention weights themselves


def verify(schedule: Schedule) -> None:
    """Raises IllegalScheduleError with the first rule that `schedule` breaks, the place, and what was found."""
    for rule in RULES:
        for found in rule(schedule):
            raise IllegalScheduleError(
                f"{found}. Rule: {rule.__doc__} Compile the schedule again, or correct the file."
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def rows_have_one_character_a_step(s: Schedule) -> Iterator[str]:
    """Every row has one character a step, site rows of C R F P - _, stack rows of . S - _."""
    if not s.transformers:
        yield "no transformer"
    for name, plan in s.transformers.items():
        if not plan.rows:
            yield f"{name} has no rows"
        for key, row in [*plan.rows.items(), ("stack", plan.stack)]:
            letters = ".S-_" if key == "stack" else "CRFP-_"
            if len(row) != s.steps:
                yield f"row {name}/{key} has {len(row)} characters for {s.steps} steps"
            if wrong := set(row) - set(letters):
                yield f"row {name}/{key} holds {min(wrong)!r}"


def sites_are_known_to_the_fingerprint(s: Schedule) -> Iterator[str]:
    """The fingerprint gives the tokens of every site, and nothing of a wrong type."""
    for name, plan in s.transformers.items():
        for site in plan.rows:
            try:
                known = plan.tokens(site) > 0 and {type(plan.kind(site)), type(plan.layout(site))} <= {str, type(None)}
                plan.holds_text(site)
            except (LookupError, ValueError, TypeError, AttributeError):
                known = False
            if not known:
                yield f"site {name}/{site} has no tokens in the fingerprint, or another entry of it has a wrong type"


def first_step_computes(s: Schedule) -> Iterator[str]:
    """A transformer's first step is all C with the stack running."""
    for name, plan in s.transformers.items():
        first = next((t for t, action in enumerate(plan.stack) if action != "_"), None)
        if first is None:
            yield f"{name} is never called"
        elif plan.stack[first] != "." or any(row[first] != "C" for row in plan.rows.values()):
            yield f"{name} does not compute everything at its first step {first}"


def columns_agree(s: Schedule) -> Iterator[str]:
    """Sites are - in skipped columns and only there, except a prefix of C under an S; _ is in all rows or in none."""
    for name, plan in s.transformers.items():
        for t, action in enumerate(plan.stack):
            column = "".join(row[t] for row in plan.rows.values())
            if (action == "_" and set(column) != {"_"}) or (action != "_" and "_" in column):
                yield f"{name} mixes _ with other actions at step {t}"
            if action == "." and "-" in column:
                yield f"{name} has a - under a running stack at step {t}"
            if action == "-" and set(column) != {"-"}:
                yield f"{name} has a site that runs while the network is not called at step {t}"
            if action == "S" and (set(column) - set("C-") or "-C" in column):
                yield f"{name} has other cells than a prefix of C under the S at step {t}"


def one_transformer_a_step(s: Schedule) -> Iterator[str]:
    """At each step exactly one transformer is not _."""
    for t, column in enumerate(zip(*(plan.stack for plan in s.transformers.values()), strict=True)):
        if (count := sum(action != "_" for action in column)) != 1:
            yield f"{count} transformers are called at step {t}"


def prunes_have_their_k(s: Schedule) -> Iterator[str]:
    """There is one k for each P cell, between 0 and the site's tokens."""
    for name, plan in s.transformers.items():
        if extra := set(plan.k) - set(plan.rows):
            yield f"k names the unknown site {name}/{min(extra)}"
        for site, row in plan.rows.items():
            k, tokens = plan.k.get(site, ()), plan.tokens(site)
            if len(k) != row.count("P"):
                yield f"site {name}/{site} has {row.count('P')} P cells and {len(k)} values of k"
            if not all(_is_whole(v) and 0 <= v <= tokens for v in k):
                yield f"site {name}/{site} has a k outside 0…{tokens}"


def rule_goes_with_prunes(s: Schedule) -> Iterator[str]:
    """There is a token rule if and only if there are P cells, with a known base and finite numbers."""
    rule = s.token_rule
    if (rule is not None) != any("P" in row for plan in s.transformers.values() for row in plan.rows.values()):
        yield "a token rule without P cells" if rule else "P cells without a token rule"
    if rule is not None:
        if rule.base not in BASES:
            yield f"token rule base {rule.base!r}, known are {', '.join(BASES)}"
        if not all(map(_is_finite, (rule.age_weight, rule.age_period, rule.bonus))):
            yield "a token rule with a value that is no number"
        elif rule.age_period <= 0 or not _is_whole(rule.bonus_grid) or rule.bonus_grid < 1:
            yield "a token rule with age_period or bonus_grid not above 0"


def rules_have_what_they_observe(s: Schedule) -> Iterator[str]:
    """The block of each pruned site has the attention that the token rule reads; shared halves need guidance in halves."""
    rule = s.token_rule
    if rule is None:
        return
    if rule.share_halves and s.sampler.guidance_form != "halves":
        yield f"a token rule that shares halves, with guidance of form {s.sampler.guidance_form!r}"
    if rule.base in OBSERVED:
        for name, plan in s.transformers.items():
            for site, row in plan.rows.items():
                if "P" in row and source_of(plan, site, rule.base) is None:
                    kind = OBSERVED[rule.base]
                    yield f"token rule {rule.base!r} for {name}/{site}, in whose block the fingerprint has no {kind} site"


def forecasts_have_sources(s: Schedule) -> Iterator[str]:
    """Each F cell has 1 to 4 sources, distinct earlier C steps of its site, and as many finite weights."""
    for name, plan in s.transformers.items():
        if extra := set(plan.forecasts) - set(plan.rows):
            yield f"forecasts name the unknown site {name}/{min(extra)}"
        for site, row in plan.rows.items():
            cells = plan.forecasts.get(site, ())
            steps = [t for t, action in enumerate(row) if action == "F"]
            if len(cells) != len(steps):
                yield f"site {name}/{site} has {len(steps)} F cells and {len(cells)} forecasts"
            for step, cell in zip(steps, cells, strict=False):
                yield from _wrong_forecast(cell, step, row, "C", f"{name}/{site}")


def stack_forecasts_have_sources(s: Schedule) -> Iterator[str]:
    """Each S cell has 1 to 4 sources, distinct earlier steps whose last block ran, finite weights, form output or drift."""
    for name, plan in s.transformers.items():
        steps = [t for t, action in enumerate(plan.stack) if action == "S"]
        if len(steps) != len(plan.stack_forecasts):
            yield f"{name} has {len(steps)} S cells and {len(plan.stack_forecasts)} stack forecasts"
        for step, cell in zip(steps, plan.stack_forecasts, strict=False):
            if cell.form not in ("output", "drift"):
                yield f"{name} has an S cell of form {cell.form!r}"
            yield from _wrong_forecast(cell, step, plan.stack, ".", f"{name}/stack")


def _wrong_forecast(cell: Forecast, step: int, row: str, source_action: str, where: str) -> Iterator[str]:
    count = len(cell.sources)
    if not 1 <= count <= MAX_SOURCES or len(set(cell.sources)) != count or len(cell.weights) != count:
        yield f"{where} has {count} sources and {len(cell.weights)} weights at step {step}"
    for source in cell.sources:
        if not _is_whole(source) or not 0 <= source < step or row[source] != source_action:
            yield f"{where} forecasts step {step} from step {source}, which is no earlier computed step"
    for weight in cell.weights:
        if not _is_finite(weight):
            yield f"{where} has the weight {weight} at step {step}"
        elif float(f"{weight:.6g}") != weight:
            yield f"{where} has the weight {weight} at step {step}, which has more than 6 significant digits"


def turns_begin_anew(s: Schedule) -> Iterator[str]:
    """After steps of another transformer (_), a transformer first computes everything, and forecasts from nothing earlier."""
    for name, plan in s.transformers.items():
        past = plan.past()
        for t, age in enumerate(past):
            if age == 0 and (plan.stack[t] != "." or any(row[t] != "C" for row in plan.rows.values())):
                yield f"{name} does not compute everything at step {t}, its first after another transformer's"
        rows = [(site, plan.rows[site], "F", cells) for site, cells in plan.forecasts.items()]
        for site, row, action, cells in [*rows, ("stack", plan.stack, "S", plan.stack_forecasts)]:
            for step, cell in zip((t for t, a in enumerate(row) if a == action), cells, strict=True):
                if min(cell.sources) < (begin := step - past[step]):
                    yield f"{name}/{site} forecasts step {step} from before step {begin}, where its turn begins"


def update_is_complete(s: Schedule) -> Iterator[str]:
    """An update has a known basis, 1 to 4 outputs of history, T rows of finite coefficients, 0 for outputs still to come."""
    update = s.update
    if update is None:
        if any("-" in plan.stack for plan in s.transformers.values()):
            yield "a step without network (-) and no update"
        return
    if update.basis not in ("output", "data") or not 1 <= update.history <= 4:
        yield f"an update of basis {update.basis!r} and history {update.history}"
    if len(update.coefficients) != s.steps or any(len(row) != update.history + 1 for row in update.coefficients):
        yield f"update coefficients not of {s.steps} rows of {update.history + 1}"
        return
    outputs = 0
    for t, row in enumerate(update.coefficients):
        outputs += any(plan.stack[t] in ".S" for plan in s.transformers.values())
        if not all(_is_finite(c) and float(f"{c:.9g}") == c for c in row):
            yield f"an update coefficient at step {t} that is no number of at most 9 significant digits"
        elif any(row[1 + outputs :]):
            yield f"an update at step {t} that weighs outputs that do not exist yet"


RULES: tuple[Callable[[Schedule], Iterator[str]], ...] = (
    rows_have_one_character_a_step,
    sites_are_known_to_the_fingerprint,
    first_step_computes,
    columns_agree,
    one_transformer_a_step,
    prunes_have_their_k,
    rule_goes_with_prunes,
    rules_have_what_they_observe,
    forecasts_have_sources,
    stack_forecasts_have_sources,
    turns_begin_anew,
    update_is_complete,
)


def source_of(plan: Plan, site: str, base: str) -> str | None:
    """Returns the site whose attention `base` reads for `site`, one of the same block; None if the block has none."""
    block = SiteKey.parse(site).block
    for key in plan.rows:
        if SiteKey.parse(key).block == block and plan.kind(key) == OBSERVED[base]:
            return key
    return None


def chooses(plan: Plan, site: str, step: int) -> bool:
    """Returns whether the site has to choose among its tokens at `step`: a P cell of neither none nor all of them."""
    if plan.rows[site][step] != "P":
        return False
    return 0 < plan.k[site][plan.cell(site, step, "P")] < plan.tokens(site)


def observed_steps(plan: Plan, base: str) -> dict[str, frozenset[int]]:
    """Returns, for each site whose attention is read, the steps (C or P) at which its statistic has to be recorded."""
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
    wanted = False  # whether a later cell reads the statistic as it is after this step, before a C replaces all of it
    for step in reversed(range(len(row))):
        reading = [site for site in readers if chooses(plan, site, step)]
        after = any(order[site] > order[source] for site in reading)
        before = any(order[site] <= order[source] for site in reading)
        writes = row[step] == "C" or (row[step] == "P" and plan.k[source][plan.cell(source, step, "P")] > 0)
        if writes and (wanted or after):
            steps.add(step)
        wanted = before or (row[step] != "C" and (wanted or after))
    return frozenset(steps)
