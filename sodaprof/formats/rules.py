"""Whether a schedule is legal: rules that need only the file. Each rule is one function; `RULES` holds all of them.

Whether a schedule matches a pipeline is checked by the runtime. The second half of the file says which attention a token rule
reads, and at which steps it has to be recorded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from ..errors import IllegalScheduleError
from .sampler import DIGITS, LONGEST_HISTORY
from .schedule import Forecast, Plan, Schedule
from .sites import SiteKey, check_fingerprint

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


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _has_digits(value: Any, digits: int) -> bool:
    """Returns whether the value is a number of at most so many significant digits."""
    return _is_finite(value) and float(f"{value:.{digits}g}") == value


def _rows(schedule: Schedule) -> Iterator[tuple[str, Plan, str, str]]:
    """Yields every row of a site as its place, the plan, the site and the row."""
    for name, plan in schedule.transformers.items():
        for site, row in plan.rows.items():
            yield f"{name}/{site}", plan, site, row


def rows_have_one_character_a_step(s: Schedule) -> Iterator[str]:
    """Every row has one character a step, site rows of C R F P - _, stack rows of . S - _."""
    if not s.transformers:
        yield "no transformer"
    for name, plan in s.transformers.items():
        if not plan.rows:
            yield f"{name} has no rows"
        for key, row in [*plan.rows.items(), ("stack", plan.stack)]:
            if len(row) != s.steps:
                yield f"row {name}/{key} has {len(row)} characters for {s.steps} steps"
            if wrong := set(row) - set(".S-_" if key == "stack" else "CRFP-_"):
                yield f"row {name}/{key} holds {min(wrong)!r}"


def sites_are_known_to_the_fingerprint(s: Schedule) -> Iterator[str]:
    """The fingerprint gives the tokens of every site, and nothing of a wrong type."""
    for name, plan in s.transformers.items():
        try:
            check_fingerprint(plan, plan.rows)
        except ValueError as error:
            yield f"{name}: {error}"


def turns_begin_with_full_steps(s: Schedule) -> Iterator[str]:
    """At its first step, and at the first after another transformer's, a transformer is all C with the stack running."""
    for name, plan in s.transformers.items():
        begins = [step for step, age in enumerate(plan.past()) if age == 0]
        if not begins:
            yield f"{name} is never called"
        for step in begins:
            if plan.stack[step] != "." or any(row[step] != "C" for row in plan.rows.values()):
                yield f"{name} does not compute everything at step {step}, the first of a turn"


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
    yield from _unknown_sites(s, "k")
    for place, plan, site, row in _rows(s):
        k, tokens = plan.k.get(site, ()), plan.tokens(site)
        if len(k) != row.count("P"):
            yield f"site {place} has {row.count('P')} P cells and {len(k)} values of k"
        if not all(_is_whole(v) and 0 <= v <= tokens for v in k):
            yield f"site {place} has a k outside 0…{tokens}"


def _unknown_sites(s: Schedule, field: str) -> Iterator[str]:
    for name, plan in s.transformers.items():
        if extra := set(getattr(plan, field)) - set(plan.rows):
            yield f"{field} of the unknown site {name}/{min(extra)}"


def rule_goes_with_prunes(s: Schedule) -> Iterator[str]:
    """There is a token rule if and only if there are P cells, with a known base and finite numbers."""
    rule = s.token_rule
    if (rule is not None) != any("P" in row for *_, row in _rows(s)):
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
    kind = OBSERVED.get(rule.base)
    for name, plan in s.transformers.items() if kind else ():
        sources = _sources(plan, rule.base)
        for site, row in plan.rows.items():
            if "P" in row and SiteKey.parse(site).block not in sources:
                yield f"token rule {rule.base!r} for {name}/{site}, in whose block the fingerprint has no {kind} site"


def forecasts_have_sources(s: Schedule) -> Iterator[str]:
    """Each F cell has 1 to 4 sources, distinct earlier C steps of its site in the same turn, and as many finite weights."""
    yield from _unknown_sites(s, "forecasts")
    for place, plan, site, row in _rows(s):
        yield from _wrong_forecasts(plan, row, "F", "C", plan.forecasts.get(site, ()), place)


def stack_forecasts_have_sources(s: Schedule) -> Iterator[str]:
    """Each S cell has 1 to 4 sources as an F cell has, earlier steps whose last block ran, and the form output or drift."""
    for name, plan in s.transformers.items():
        yield from (
            f"{name} has an S cell of form {cell.form!r}"
            for cell in plan.stack_forecasts
            if cell.form not in ("output", "drift")
        )
        yield from _wrong_forecasts(plan, plan.stack, "S", ".", plan.stack_forecasts, f"{name}/stack")


def _wrong_forecasts(
    plan: Plan, row: str, action: str, source_action: str, forecasts: tuple[Forecast, ...], place: str
) -> Iterator[str]:
    steps = [step for step, found in enumerate(row) if found == action]
    if len(steps) != len(forecasts):
        yield f"{place} has {len(steps)} {action} cells and {len(forecasts)} forecasts"
    past = plan.past()
    for step, cell in zip(steps, forecasts, strict=False):
        count = len(cell.sources)
        if not 1 <= count <= MAX_SOURCES or len(set(cell.sources)) != count or len(cell.weights) != count:
            yield f"{place} has {count} sources and {len(cell.weights)} weights at step {step}"
        for source in cell.sources:
            if not _is_whole(source) or not 0 <= source < step or row[source] != source_action:
                yield f"{place} forecasts step {step} from step {source}, which is no earlier computed step"
            if source < step - past[step]:
                yield f"{place} forecasts step {step} from step {source}, before its turn begins"
        for weight in cell.weights:
            if not _has_digits(weight, 6):
                yield f"{place} has the weight {weight} at step {step}, which is no number of at most 6 significant digits"


def update_is_complete(s: Schedule) -> Iterator[str]:
    """An update has a known basis, 1 to 8 outputs of history, T rows of finite coefficients, 0 for outputs still to come."""
    update = s.update
    if update is None:
        if any("-" in plan.stack for plan in s.transformers.values()):
            yield "a step without network (-) and no update"
        return
    if update.basis not in ("output", "data") or not 1 <= update.history <= LONGEST_HISTORY:
        yield f"an update of basis {update.basis!r} and history {update.history}"
    if len(update.coefficients) != s.steps or any(len(row) != update.history + 1 for row in update.coefficients):
        yield f"update coefficients not of {s.steps} rows of {update.history + 1}"
        return
    if update.initial is not None and len(update.initial) != s.steps:
        yield f"{len(update.initial)} weights of the first latents for {s.steps} steps"
        return
    outputs = 0
    for t, row in enumerate(update.coefficients):
        outputs += any(plan.stack[t] in ".S" for plan in s.transformers.values())
        if not all(_has_digits(c, DIGITS) for c in (*row, update.initial[t] if update.initial else 0)):
            yield f"an update coefficient at step {t} that is no number of at most 9 significant digits"
        elif any(row[1 + outputs :]):
            yield f"an update at step {t} that weighs outputs that do not exist yet"


def times_keep_the_order(s: Schedule) -> Iterator[str]:
    """Network times, one a step, fall from call to call within the sampler's range; without a call they are the sampler's."""
    if s.update is None or s.update.times is None:
        return
    times, trained = s.update.times, s.sampler.config.get("num_train_timesteps")
    if len(times) != s.steps or not all(map(_is_finite, times)):
        yield f"{len(times)} network times for {s.steps} steps, or one that is no number"
        return
    end: float = trained if trained is not None and _is_finite(trained) else 1.001 * max(s.sampler.timesteps)
    stacks = [plan.stack for plan in s.transformers.values()]
    before, counts, least = math.inf, Counter(times), list(accumulate(times, min))
    most = list(accumulate(reversed(times), max))[::-1]  # from each step on
    for t, time in enumerate(times):
        if any(stack[t] in ".S" for stack in stacks):
            if not 0 <= time <= end:
                yield f"the network time {time:g} at step {t}, outside 0…{end:g}"
            if time >= before or counts[time] > 1:
                yield f"the network time {time:g} at step {t}, at or after that of another step"
            before = time
        elif time != s.sampler.timesteps[t]:
            yield f"the network time {time:g} at step {t}, at which no network is called and the sampler is at another"
        if t and any(stack[t] != "_" == stack[t - 1] for stack in stacks) and least[t - 1] <= most[t]:
            yield f"network times on both sides of that at which another transformer begins, step {t}"


RULES: tuple[Callable[[Schedule], Iterator[str]], ...] = (
    rows_have_one_character_a_step,
    sites_are_known_to_the_fingerprint,
    turns_begin_with_full_steps,
    columns_agree,
    one_transformer_a_step,
    prunes_have_their_k,
    rule_goes_with_prunes,
    rules_have_what_they_observe,
    forecasts_have_sources,
    stack_forecasts_have_sources,
    update_is_complete,
    times_keep_the_order,
)


def source_of(plan: Plan, site: str, base: str) -> str | None:
    """Returns the site whose attention `base` reads for `site`, one of the same block; None if the block has none."""
    return _sources(plan, base).get(SiteKey.parse(site).block)


def _sources(plan: Plan, base: str) -> dict[str, str]:
    """Returns by block the first site whose attention `base` reads."""
    found: dict[str, str] = {}
    for key in plan.rows:
        if plan.kind(key) == OBSERVED[base]:
            found.setdefault(SiteKey.parse(key).block, key)
    return found


def chooses(plan: Plan, site: str, step: int) -> bool:
    """Returns whether the site has to choose among its tokens at `step`: a P cell of neither none nor all of them."""
    return 0 < plan.computed(site, step) < plan.tokens(site)


def observed_steps(plan: Plan, base: str) -> dict[str, frozenset[int]]:
    """Returns, for each site whose attention is read, the steps (C or P) at which its statistic has to be recorded."""
    if base not in OBSERVED:
        return {}
    readers: dict[str, list[str]] = {}
    sources = _sources(plan, base)
    for site, row in plan.rows.items():
        source = sources.get(SiteKey.parse(site).block) if "P" in row else None
        if source is not None:
            readers.setdefault(source, []).append(site)
    order = {site: number for number, site in enumerate(plan.rows)}
    return {source: _observed(plan, source, sites, order) for source, sites in readers.items()}


def _observed(plan: Plan, source: str, readers: list[str], order: dict[str, int]) -> frozenset[int]:
    row, steps = plan.rows[source], set()
    later = {site for site in readers if order[site] > order[source]}  # they run after it in the same step
    wanted = False  # whether a later cell reads the statistic as it is after this step, before a C replaces all of it
    for step in reversed(range(len(row))):
        reading = {site for site in readers if chooses(plan, site, step)}
        after = wanted or bool(reading & later)
        if plan.computed(source, step) and after:
            steps.add(step)
        wanted = bool(reading - later) or (row[step] != "C" and after)
    return frozenset(steps)
