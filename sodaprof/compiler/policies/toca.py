"""ToCa (arXiv 2410.05317) and DuCa (arXiv 2412.18911): full steps by a counter, some tokens or no block in between.

Between full steps ToCa reuses self-attention and recomputes the highest-scored tokens of the other modules. DuCa skips
the stack in some of these steps: the newest output of the last block stands in for it. The rules are written for three
families of models, each with constants of its own; hyper-parameters default to the released ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BudgetError, UnsupportedModelError
from ...formats.cost import CostModel
from ...formats.profile import Profile
from ...formats.rules import BASES
from ...formats.schedule import Forecast, Plan, Schedule, TokenRule
from ...formats.sites import Model, Sampler, Transformer
from ..problem import one_transformer, sign, take_knobs, within
from .toca_steps import RATIOS, Ratio, StepType, dit_types, opensora_types, pixart_types

MOST_R, R_UNIT = 2.0, 1e-6  # the range and the grid on which a budget chooses R


@dataclass(frozen=True)
class Family:
    """What the rules say of one architecture; pairs are of ToCa and DuCa."""

    kinds: tuple[str, ...]  # of sites that its blocks have
    types: Callable[[int, int, float, bool, bool], list[StepType]]
    base: tuple[str, str]  # score of tokens
    bonus: tuple[float, float]
    bonus_grid: int
    ratio: str  # its schedule of ratios
    rate: tuple[float, float]  # R


FAMILIES = {  # by class of transformer
    "DiTTransformer2DModel": Family(
        ("attn", "mlp"), dit_types, ("attention_received",) * 2, (0.6, 0.8), 2, "ddim50", (0.07, 0.05)
    ),
    "PixArtTransformer2DModel": Family(
        ("attn", "cross_attn", "mlp"), pixart_types, ("cross_attention_entropy",) * 2, (0.4, 0.4), 4, "pixart", (0.3, 0.75)
    ),
    "STDiT3": Family(
        ("attn", "cross_attn", "mlp"), opensora_types, ("cross_attention_entropy", "value_norm"), (0.0, 0.0), 1,
        "opensora", (0.1, 0.1),
    ),
}  # fmt: skip


def compile_toca(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns ToCa's schedule: full steps every N or so, in between R chooses how many tokens are recomputed.

    budget: 0 for the released R (or the knob's); above 0 the R is sought that comes closest above it, at the given N.
    Raises UnsupportedModelError for models that the rules were not written for, BudgetError as all policies do.
    """
    return _compile("toca", model, sampler, profile, cost, budget, knobs)


def compile_duca(
    model: Model, sampler: Sampler, profile: Profile | None, cost: CostModel, budget: float, knobs: dict[str, Any]
) -> Schedule:
    """Returns DuCa's schedule: ToCa's, but the stack is skipped at even distances from the full steps.

    The skipped step takes the newest output of the last block. Budget and errors as for `compile_toca`.
    """
    return _compile("duca", model, sampler, profile, cost, budget, knobs)


def default_knobs(policy: str, family: Family, steps: int, ratio: str = "") -> dict[str, Any]:
    """Returns the released hyper-parameters; `ratio` names another schedule of ratios than the family's.

    DiT above 100 steps takes those of DDPM-250. DuCa released none for it: they are ToCa's with DuCa's R.
    """
    ratio = ratio or ("ddpm250" if family.ratio == "ddim50" and steps > 100 else family.ratio)
    duca = policy == "duca"
    return {
        "N": 4 if ratio == "ddpm250" else 3,  # base period of the full steps
        "R": family.rate[duca],  # base share of tokens recomputed in between
        "score": family.base[duca],  # base of the token rule
        "ratio": ratio,  # one of RATIOS: how the share changes over steps, layers and modules
        "once_per_step": 0,  # 1: no mixed steps; the published code decides once a layer
        "lambda3": 0.25,  # weight of a token's age
    }


def _compile(
    policy: str,
    model: Model,
    sampler: Sampler,
    profile: Profile | None,
    cost: CostModel,
    budget: float,
    knobs: dict[str, Any],
) -> Schedule:
    name = one_transformer(model, policy)
    transformer = model.transformers[name]
    family = _family(policy, model, transformer)
    chosen = take_knobs(policy, default_knobs(policy, family, sampler.steps, str(knobs.get("ratio", ""))), knobs)
    _check(family, chosen)
    rule = _token_rule(policy, family, chosen, sampler)

    def drawn(rate: float) -> Schedule:
        skips, once = policy == "duca", bool(chosen["once_per_step"])
        types = family.types(sampler.steps, chosen["N"], rate, skips, once)
        plan = _draw(transformer, types, RATIOS[chosen["ratio"]], rate)
        return Schedule({name: plan}, sampler, model.shape, {}, token_rule=rule if plan.k else None)

    if budget <= 0:
        schedule = drawn(chosen["R"])
    elif "R" in knobs:
        schedule = drawn(chosen["R"])
        if not _meets(schedule, cost, budget):
            raise BudgetError(
                f"R={chosen['R']:g} with N={chosen['N']} gives {cost.speedup(schedule):.3g}x, the budget is {budget:.3g}x. "
                "Leave out --knob R to have it chosen for the budget."
            )
    else:
        chosen["R"], schedule = _fit(drawn, cost, budget, chosen["N"])
    return sign(schedule, policy, chosen, profile, model, cost, error=None)


def _family(policy: str, model: Model, transformer: Transformer) -> Family:
    """Returns the family of the transformer's class; UnsupportedModelError unless it has that family's sites."""
    if transformer.class_name not in FAMILIES:
        raise UnsupportedModelError(
            f"{model.name} runs a {transformer.class_name}; the rules of {policy} are written for {', '.join(FAMILIES)}. "
            "Use --policy soda, which takes any model."
        )
    family = FAMILIES[transformer.class_name]
    kinds = {site.kind for site in transformer.sites}
    if kinds != set(family.kinds):
        raise UnsupportedModelError(
            f"{model.name} has sites of {', '.join(sorted(kinds))}; the rules of {policy} for {transformer.class_name} "
            f"need {', '.join(family.kinds)}. Use --policy soda, which takes any model."
        )
    factors = RATIOS[family.ratio].modules
    fixed = [site.key for site in transformer.sites if factors.get(site.kind, 0) > 0 and not site.prunable]
    if fixed:
        raise UnsupportedModelError(
            f"{model.name}: {fixed[0]} cannot recompute some tokens alone, which {policy} has it do. Use --policy soda."
        )
    return family


def _check(family: Family, knobs: dict[str, Any]) -> None:
    """Raises BudgetError on knobs that make no sense, UnsupportedModelError on rules for sites that are not there."""
    for knob, allowed in (("score", BASES), ("ratio", tuple(RATIOS)), ("once_per_step", (0, 1))):
        if knobs[knob] not in allowed:
            raise BudgetError(f"Knob {knob} is {knobs[knob]!r}; expected one of {', '.join(map(str, allowed))}.")
    for knob, least in (("N", 1), ("R", 0), ("lambda3", 0)):
        if knobs[knob] < least:
            raise BudgetError(f"Knob {knob} is {knobs[knob]}; expected at least {least}.")
    partial = set(family.kinds) - {"attn"}
    modules = set(RATIOS[knobs["ratio"]].modules)
    if "cross_attn" not in partial and ("cross_attn" in modules or knobs["score"] == "cross_attention_entropy"):
        raise UnsupportedModelError(
            f"ratio={knobs['ratio']} and score={knobs['score']} include a rule for cross_attn sites, and there are none "
            "here. Leave out these knobs, or use --policy soda."
        )
    if not partial <= modules:
        raise BudgetError(
            f"Knob ratio is {knobs['ratio']}, which has no share for {', '.join(sorted(partial - modules))}; "
            f"expected one of {', '.join(r for r in RATIOS if partial <= set(RATIOS[r].modules))}."
        )


def _token_rule(policy: str, family: Family, knobs: dict[str, Any], sampler: Sampler) -> TokenRule:
    duca = policy == "duca"
    # entropy is of both halves' text together, random tokens are drawn once; of value norms PixArt takes the mean
    shared = knobs["score"] in ("cross_attention_entropy", "random") or (
        knobs["score"] == "value_norm" and family.ratio == "pixart"
    )
    return TokenRule(
        base=knobs["score"],
        age_weight=knobs["lambda3"],
        age_period=float(knobs["N"]),
        bonus=family.bonus[duca],
        bonus_grid=family.bonus_grid,
        share_halves=shared and sampler.guidance_form == "halves",
    )


def _draw(transformer: Transformer, types: list[StepType], ratio: Ratio, rate: float) -> Plan:
    """Returns the picture of the step types: F is C; T is R in self-attention and P elsewhere; A is S over '-'.

    P stays P at k = 0 and at all tokens. In a mixed step layer 0 is C, under S for its cache only.
    """
    steps, layers = len(types), 1 + max(site.layer for site in transformer.sites)
    tables: dict[tuple[str, int], np.ndarray] = {}  # k [T, L] by kind and tokens
    rows, ks = {}, {}
    for site in transformer.sites:
        letters = [step.letter(site.layer, site.kind) for step in types]
        partial = "R" if site.kind == "attn" else "P"
        rows[site.key] = "".join({"F": "C", "T": partial, "A": "-"}[letter] for letter in letters)
        if "P" in rows[site.key]:
            key = site.kind, site.tokens
            if key not in tables:
                tables[key] = ratio.tokens(site.kind, rate, steps, layers, site.tokens)
            ks[site.key] = tuple(int(tables[key][t, site.layer]) for t in range(steps) if letters[t] == "T")
    last = [step.letter(layers - 1, "mlp") for step in types]
    stack = "".join("S" if letter == "A" else "." for letter in last)
    skips = tuple(Forecast((stack.rindex(".", 0, t),), (1.0,), "output") for t in range(steps) if stack[t] == "S")
    return Plan(transformer.class_name, transformer.fingerprint, rows, stack, ks, stack_forecasts=skips)


def _meets(schedule: Schedule, cost: CostModel, budget: float) -> bool:
    return within(cost.schedule(schedule), cost.all_compute(schedule) / budget)


def _fit(drawn: Callable[[float], Schedule], cost: CostModel, budget: float, period: int) -> tuple[float, Schedule]:
    """Returns the R in [0, 2] of smallest speed-up that meets the budget, and its schedule.

    R is bisected above 0, where more tokens cost more; R = 0 stands apart, for it changes which steps are full.
    """
    low, high = 1, round(MOST_R / R_UNIT)
    at = lambda i: round(i * R_UNIT, 6)  # noqa: E731
    options = {at(i): drawn(at(i)) for i in (0, low, high)}
    if _meets(options[at(low)], cost, budget) and not _meets(options[at(high)], cost, budget):
        while high - low > 1:
            middle = (low + high) // 2
            schedule = drawn(at(middle))
            if _meets(schedule, cost, budget):
                low, options[at(middle)] = middle, schedule
            else:
                high = middle
    meeting = {rate: cost.speedup(s) for rate, s in options.items() if _meets(s, cost, budget)}
    if not meeting:
        reachable = max(cost.speedup(s) for s in options.values())
        raise BudgetError(
            f"A budget of {budget:.4g}x cannot be met with N={period}: at most {reachable:.3g}x ({cost.unit}) can. "
            f"Ask for --budget {np.floor(reachable * 100) / 100:.2f}x or less, or set a larger --knob N."
        )
    best = min(meeting, key=lambda rate: (meeting[rate], -rate))  # k are whole: of equals, the largest R
    return best, options[best]
