"""ToCa (arXiv 2410.05317) and DuCa (arXiv 2412.18911): full steps by a counter, some tokens or no block in between.

Between full steps ToCa reuses self-attention and recomputes the highest-scored tokens of the other modules. DuCa skips
the stack at some of these steps and takes the newest output of the last block. The rules are written for three families of
models, each with constants of its own; knobs default to the released values.

Step 0 is the noisiest; `s` is the counter of the published code, which runs down from T - 1 to 0 for DiT and up for the
others. Letters of the published code: F all tokens, T some tokens, A nothing (the stack is skipped; DuCa).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ...errors import BudgetError, UnsupportedModelError
from ...formats.rules import BASES
from ...formats.schedule import Forecast, Plan, Schedule, TokenRule
from ...formats.sites import Model, Sampler, Transformer
from ..knobs import knob
from ..problem import Problem

KINDS = ("attn", "cross_attn", "mlp")
MOST_R, R_UNIT = 2.0, 1e-6  # the range and the grid on which a budget chooses R


@dataclass(frozen=True)
class Ratio:
    """Share of tokens that a T cell recomputes: R · (1 + tilt · (1 − 2 l / (L − 1))) · (start + slope · s / T) · module."""

    start: float
    slope: float
    tilt: float
    modules: dict[str, float]  # one factor a kind of site
    descending: bool  # whether s runs down

    def tokens(self, kind: str, rate: float, steps: int, layers: int, tokens: int) -> np.ndarray:
        """Returns k [T, L] at R = `rate`: the share as float32 within [0, 1], times the tokens, rounded down."""
        s = np.arange(steps)[::-1] if self.descending else np.arange(steps)
        layer = 1 + self.tilt - 2 * self.tilt * np.arange(layers) / max(layers - 1, 1)
        step = self.start + self.slope * s / steps
        share = np.clip(rate * layer * step[:, None] * self.modules[kind], 0, 1).astype(np.float32)
        return (share * np.float32(tokens)).astype(int)


RATIOS = {
    "ddim50": Ratio(3.0, -4.0, -0.2, {"mlp": 2.5}, True),  # no token in the first quarter
    "ddpm250": Ratio(1.4, -0.8, 0.8, {"mlp": 2.5}, True),
    "pixart": Ratio(1.9, -1.8, 0.6, {"cross_attn": 0.6, "mlp": 1.6}, False),
    "opensora": Ratio(1.0, 0.0, 0.0, {"cross_attn": 1 - 0.67 * 1.5, "mlp": 1.495}, False),  # below 0: no token
}


@dataclass(frozen=True)
class ToCaKnobs:
    """None is the released value of the policy for the model's family."""

    N: int = knob(None, "base period of the full steps", kind=int, least=1)
    R: float = knob(
        None, "base share of tokens recomputed between full steps, or what meets the budget", kind=float, least=0
    )
    score: str = knob(None, "base score of the token rule", kind=str, one_of=BASES)
    ratio: str = knob(None, "how the share changes over steps, layers and modules", kind=str, one_of=tuple(RATIOS))
    once_per_step: int = knob(0, "1: no mixed steps; the published code decides once a layer", one_of=(0, 1))
    lambda3: float = knob(0.25, "weight of a token's age", least=0)


# ---- which steps are full ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepType:
    """One step's letters, one for each of KINDS: in layer 0, and in all other layers. They differ in mixed steps only."""

    first: str
    rest: str

    def letter(self, layer: int, kind: str) -> str:
        return (self.rest if layer else self.first)[KINDS.index(kind)]


@dataclass(frozen=True)
class Counting:
    """What decides the step types. rate: R; skips: A at even remainders (DuCa); once: decide once a step, not once a layer."""

    steps: int
    period: int
    rate: float
    skips: bool
    once: bool

    def letter(self, s: int, period: int) -> str:
        remainder = s % period
        if remainder == 0:
            return "F"
        return "A" if self.skips and remainder % 2 == 0 else "T"

    def drifted(self, s: int, weight: float) -> int:
        """Returns the period N / (1 + w − 2 w s / T) in float32, rounded half to even."""
        return int(np.rint(np.float32(self.period) / np.float32(1 + weight - 2 * weight * s / self.steps)))

    def types(self, counter: Iterable[int], renewed: Callable[[int], int]) -> list[StepType]:
        """Returns the steps of a counter; a full layer 0 renews the period, by which the other layers then decide."""
        types: list[StepType] = []
        period = self.period
        for s in counter:
            first = rest = "F" if not types else self.letter(s, period)
            if first == "F":
                period = renewed(s)
                if types and not self.once:
                    rest = self.letter(s, period)
            types.append(StepType(first * 3, rest * 3))
        return types


def dit_types(count: Counting) -> list[StepType]:
    """Returns the steps of DiT: F if the descending counter is a multiple of a period that changes with it; at R = 0 of N."""
    steps = count.steps

    def renewed(s: int) -> int:
        if count.rate and int(0.2 * steps) <= s < int(0.4 * steps):
            return 2
        return count.drifted(s, 0.4 if count.rate else 0.0)

    return count.types(range(steps - 1, -1, -1), renewed)


def pixart_types(count: Counting) -> list[StepType]:
    """Returns the steps of PixArt: as DiT's, but counted upwards, without a band of period 2; constant N for DuCa."""
    weight = -0.2 if count.rate and not count.skips else 0.0
    return count.types(range(count.steps), lambda s: count.drifted(s, weight))


def opensora_types(count: Counting) -> list[StepType]:
    """Returns the steps of Open-Sora: F in the first three, then every N steps, for cross-attention every 2 N.

    The published code has 3 and 6 as constants. It decides a module at a time, so there are no mixed steps.
    """
    types = []
    for s in range(count.steps):
        short = "F" if s <= 2 else count.letter(s, count.period)
        # between two of its own full steps, cross-attention has the letters of the others
        long = "F" if s <= 2 or s % (2 * count.period) == 0 else "T" if short == "F" else short
        types.append(StepType(short + long + short, short + long + short))
    return types


# ---- the families of models -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """The rules' constants for one architecture; pairs are of ToCa and DuCa."""

    kinds: tuple[str, ...]  # of sites that its blocks have
    types: Callable[[Counting], list[StepType]]
    base: tuple[str, str]  # score of tokens
    bonus: tuple[float, float]
    bonus_grid: int
    ratio: str  # its schedule of ratios
    rate: tuple[float, float]  # R


ENTROPY = "cross_attention_entropy"
FAMILIES = {  # by class of transformer
    "DiTTransformer2DModel": Family(
        ("attn", "mlp"), dit_types, ("attention_received",) * 2, (0.6, 0.8), 2, "ddim50", (0.07, 0.05)
    ),
    "PixArtTransformer2DModel": Family(KINDS, pixart_types, (ENTROPY,) * 2, (0.4, 0.4), 4, "pixart", (0.3, 0.75)),
    "STDiT3": Family(KINDS, opensora_types, (ENTROPY, "value_norm"), (0.0, 0.0), 1, "opensora", (0.1, 0.1)),
}


def family_of(policy: str, model: Model, transformer: Transformer) -> Family:
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
            f"{model.name}: {fixed[0]} cannot recompute some tokens alone, as {policy} does. Use --policy soda."
        )
    return family


# ---- the policies -----------------------------------------------------------------------------------------------------


def compile_toca(problem: Problem, knobs: ToCaKnobs) -> Schedule:
    """Returns ToCa's schedule: full steps every N or so, in between R sets how many tokens are recomputed.

    With a budget of 0 R is the released one (or the knob's); else the one of smallest speed-up that meets the budget at the
    given N. Raises UnsupportedModelError for models that the rules were not written for, BudgetError as all policies do.
    """
    return _compile("toca", problem, knobs)


def compile_duca(problem: Problem, knobs: ToCaKnobs) -> Schedule:
    """Returns DuCa's schedule: ToCa's, but the stack is skipped at even distances from the full steps.

    A skipped step takes the newest output of the last block. Budget and errors as for `compile_toca`.
    """
    return _compile("duca", problem, knobs)


def _compile(policy: str, problem: Problem, knobs: ToCaKnobs) -> Schedule:
    name, sampler = problem.only_transformer(policy), problem.sampler
    transformer = problem.model.transformers[name]
    family = family_of(policy, problem.model, transformer)
    chosen = _released(policy, family, sampler.steps, knobs)
    _check(family, chosen)
    rule = _token_rule(policy, family, chosen, sampler)

    def drawn(rate: float) -> Schedule:
        count = Counting(sampler.steps, chosen.N, rate, policy == "duca", bool(chosen.once_per_step))
        plan = _draw(transformer, family.types(count), RATIOS[chosen.ratio], rate)
        return Schedule({name: plan}, sampler, problem.model.shape, {}, token_rule=rule if plan.k else None)

    if problem.budget > 0 and knobs.R is None:
        chosen = replace(chosen, R=_rate(problem, drawn, chosen.N))
    elif problem.budget > 0:
        problem.check_given("R", chosen.R, drawn(chosen.R), f" with N={chosen.N}")
    return problem.signed(drawn(chosen.R), policy, chosen, None)


def _released(policy: str, family: Family, steps: int, knobs: ToCaKnobs) -> ToCaKnobs:
    """Returns the knobs with the released values in place of None.

    DiT above 100 steps takes those of DDPM-250. DuCa released none for it: they are ToCa's with DuCa's R.
    """
    ratio, duca = knobs.ratio, policy == "duca"
    if ratio is None:
        ratio = "ddpm250" if family.ratio == "ddim50" and steps > 100 else family.ratio
    period = (4 if ratio == "ddpm250" else 3) if knobs.N is None else knobs.N
    rate = family.rate[duca] if knobs.R is None else knobs.R
    return replace(knobs, N=period, R=rate, score=knobs.score or family.base[duca], ratio=ratio)


def _check(family: Family, knobs: ToCaKnobs) -> None:
    """Raises UnsupportedModelError for rules of sites that the model lacks, BudgetError for ratios without a share for some."""
    partial = set(family.kinds) - {"attn"}
    modules = set(RATIOS[knobs.ratio].modules)
    if "cross_attn" not in partial and ("cross_attn" in modules or knobs.score == ENTROPY):
        raise UnsupportedModelError(
            f"ratio={knobs.ratio} and score={knobs.score} include a rule for cross_attn sites, and there are none "
            "here. Leave out these knobs, or use --policy soda."
        )
    if not partial <= modules:
        raise BudgetError(
            f"Knob ratio is {knobs.ratio}, which has no share for {', '.join(sorted(partial - modules))}; "
            f"expected one of {', '.join(r for r in RATIOS if partial <= set(RATIOS[r].modules))}."
        )


def _token_rule(policy: str, family: Family, knobs: ToCaKnobs, sampler: Sampler) -> TokenRule:
    duca = policy == "duca"
    # entropy is of both halves' text together, random tokens are drawn once; of value norms PixArt takes the mean
    shared = knobs.score in (ENTROPY, "random") or (knobs.score == "value_norm" and family.ratio == "pixart")
    return TokenRule(
        base=knobs.score,
        age_weight=knobs.lambda3,
        age_period=float(knobs.N),
        bonus=family.bonus[duca],
        bonus_grid=family.bonus_grid,
        share_halves=shared and sampler.guidance_form == "halves",
    )


def _draw(transformer: Transformer, types: list[StepType], ratio: Ratio, rate: float) -> Plan:
    """Returns the plan of the step types: F is C; T is R in self-attention and P elsewhere; A is S over '-'.

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


def _rate(problem: Problem, drawn: Callable[[float], Schedule], period: int) -> float:
    """Returns the R in [0, 2] of smallest speed-up that meets the budget, the largest of equals, for numbers of tokens are whole.

    R is bisected above 0, where more tokens cost more. R = 0 is a case of its own, for it changes which steps are full.
    """

    def rate(units: float) -> float:  # from −2 000 000 to −1: a larger number is a cheaper schedule
        return round(abs(units) * R_UNIT, 6)

    def loop(units: float) -> Schedule:
        return drawn(rate(units))

    most, least, candidates = -round(MOST_R / R_UNIT), -1, [0.0]
    if problem.meets(loop(most)):
        candidates.append(most)
    elif problem.meets(loop(least)):
        candidates.append(problem.cheapest_that_meets(loop, most, least, absolute=1))
    meeting = [units for units in candidates if problem.meets(loop(units))]
    if not meeting:
        cheapest = max(loop(0), loop(least), key=problem.speedup)
        raise problem.unreachable(cheapest, f" with N={period}", ", or set a larger --knob N")
    return rate(min(meeting, key=lambda units: (problem.speedup(loop(units)), units)))
