"""ToCa (arXiv 2410.05317) and DuCa (arXiv 2412.18911): full steps by a counter, some tokens or no block in between.

Step 0 is the noisiest; `s` is the counter of the published code, which runs down from T - 1 to 0 for DiT and up for the
others. Letters of the published code: F all tokens, T some tokens, A nothing (the stack is skipped; DuCa).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ...errors import BudgetError, UnsupportedModelError
from ...formats.rules import BASES
from ...formats.schedule import Forecast, Plan, Schedule, TokenRule
from ...formats.sites import Model, Sampler, Transformer
from ..knobs import knob
from ..problem import Problem

KINDS = ("attn", "cross_attn", "mlp")
MOST_R = 2_000_000  # millionths: a budget chooses R among whole numbers of them, from 0 to this
Step = tuple[str, str]  # letters of KINDS: in layer 0, in all other layers; they differ in mixed steps only


@dataclass(frozen=True)
class Ratio:
    """Share of tokens that a T cell recomputes: R · (1 + tilt · (1 − 2 l / (L − 1))) · (start + slope · s / T) · module."""

    start: float
    slope: float
    tilt: float
    modules: dict[str, float]  # one factor a kind of site

    def tokens(self, kind: str, rate: float, counter: Sequence[int], layers: int, tokens: int) -> np.ndarray:
        """Returns k [T, L] at R = `rate`: the share as float32 within [0, 1], times the tokens, rounded down."""
        layer = 1 + self.tilt - 2 * self.tilt * np.arange(layers) / max(layers - 1, 1)
        step = self.start + self.slope * np.array(counter) / len(counter)
        share = np.clip(rate * layer * step[:, None] * self.modules[kind], 0, 1).astype(np.float32)
        return (share * np.float32(tokens)).astype(int)


RATIOS = {
    "ddim50": Ratio(3.0, -4.0, -0.2, {"mlp": 2.5}),  # no token in the first quarter
    "ddpm250": Ratio(1.4, -0.8, 0.8, {"mlp": 2.5}),
    "pixart": Ratio(1.9, -1.8, 0.6, {"cross_attn": 0.6, "mlp": 1.6}),
    "opensora": Ratio(1.0, 0.0, 0.0, {"cross_attn": 1 - 0.67 * 1.5, "mlp": 1.495}),  # below 0: no token
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


def _letter(s: int, period: int, duca: bool) -> str:
    remainder = s % period
    return "F" if remainder == 0 else "A" if duca and remainder % 2 == 0 else "T"


def counted_steps(family: Family, counter: Sequence[int], knobs: ToCaKnobs, duca: bool) -> list[Step]:
    """Returns the steps of DiT and PixArt: F if the counter is a multiple of a period, which a full layer 0 renews.

    The new period is N / (1 + w − 2 w s / T) in float32, rounded half to even, or 2 in the family's band; at R = 0 it is N.
    The other layers decide by it, so steps are mixed, unless the knob once_per_step is set.
    """
    steps, weight = list[Step](), family.weight[duca] if knobs.R else 0.0
    band = range(*(int(share * len(counter)) for share in family.band)) if knobs.R else ()
    period = knobs.N
    for s in counter:
        first = rest = _letter(s, period, duca) if steps else "F"
        if first == "F":
            drifted = np.float32(knobs.N) / np.float32(1 + weight - 2 * weight * s / len(counter))
            period = 2 if s in band else int(np.rint(drifted))
            if steps and not knobs.once_per_step:
                rest = _letter(s, period, duca)
        steps.append((first * 3, rest * 3))
    return steps


def opensora_steps(family: Family, counter: Sequence[int], knobs: ToCaKnobs, duca: bool) -> list[Step]:
    """Returns the steps of Open-Sora: F in the first three, then every N steps, for cross-attention every 2 N.

    The published code has 3 and 6 as constants. It decides a module at a time, so there are no mixed steps.
    """
    steps = []
    for s in counter:
        short = "F" if s <= 2 else _letter(s, knobs.N, duca)
        # between two of its own full steps, cross-attention has the letters of the others
        long = "F" if s <= 2 or s % (2 * knobs.N) == 0 else "T" if short == "F" else short
        steps.append((short + long + short,) * 2)
    return steps


# ---- the families of models -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """The rules' constants for one architecture; pairs are of ToCa and DuCa."""

    kinds: tuple[str, ...]  # of sites that its blocks have
    steps: Callable[[Family, Sequence[int], ToCaKnobs, bool], list[Step]]
    base: tuple[str, str]  # score of tokens
    bonus: tuple[float, float]
    bonus_grid: int
    ratio: str  # its schedule of ratios
    rate: tuple[float, float]  # R
    descending: bool = False  # whether s runs down
    weight: tuple[float, float] = (0.0, 0.0)  # w of the period
    band: tuple[float, float] = (0.0, 0.0)  # of s / T, in which the period is 2


ENTROPY = "cross_attention_entropy"
FAMILIES = {  # by class of transformer
    "DiTTransformer2DModel": Family(
        ("attn", "mlp"),
        counted_steps,
        ("attention_received",) * 2,
        (0.6, 0.8),
        2,
        "ddim50",
        (0.07, 0.05),
        descending=True,
        weight=(0.4, 0.4),
        band=(0.2, 0.4),
    ),
    "PixArtTransformer2DModel": Family(
        KINDS, counted_steps, (ENTROPY,) * 2, (0.4, 0.4), 4, "pixart", (0.3, 0.75), weight=(-0.2, 0.0)
    ),
    "STDiT3": Family(KINDS, opensora_steps, (ENTROPY, "value_norm"), (0.0, 0.0), 1, "opensora", (0.1, 0.1)),
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


def compile_toca(problem: Problem, knobs: ToCaKnobs, duca: bool = False) -> Schedule:
    """Returns ToCa's schedule: full steps every N or so, in between R sets how many tokens are recomputed.

    duca: DuCa's, which skips the stack at even distances from the full steps and takes the newest output of the last block.
    With a budget of 0 R is the released one (or the knob's); else the one of smallest speed-up that meets the budget at the
    given N. Raises UnsupportedModelError for models that the rules were not written for, BudgetError as all policies do.
    """
    policy, sampler = "duca" if duca else "toca", problem.sampler
    name, transformer = problem.only_transformer(policy)
    family = family_of(policy, problem.model, transformer)
    chosen = _released(family, sampler.steps, knobs, duca)
    rule = _token_rule(family, chosen, sampler, duca)
    counter = range(sampler.steps)[:: -1 if family.descending else 1]

    def drawn(rate: float) -> Schedule:
        steps = family.steps(family, counter, replace(chosen, R=rate), duca)
        plan = _draw(transformer, steps, counter, chosen.ratio, rate)
        return Schedule({name: plan}, sampler, problem.model.shape, {}, token_rule=rule if plan.k else None)

    if problem.budget > 0 and knobs.R is None:
        chosen = replace(chosen, R=_rate(problem, drawn, chosen.N))
    elif problem.budget > 0:
        problem.check_given("R", chosen.R, drawn(chosen.R), f" with N={chosen.N}")
    return problem.signed(drawn(chosen.R), policy, chosen, None)


def _released(family: Family, steps: int, knobs: ToCaKnobs, duca: bool) -> ToCaKnobs:
    """Returns the knobs with the released values in place of None.

    DiT above 100 steps takes those of DDPM-250. DuCa released none for it: they are ToCa's with DuCa's R. Raises
    UnsupportedModelError for rules of sites that the model lacks, BudgetError for ratios without a share for some.
    """
    ratio = knobs.ratio or ("ddpm250" if family.ratio == "ddim50" and steps > 100 else family.ratio)
    period = (4 if ratio == "ddpm250" else 3) if knobs.N is None else knobs.N
    rate = family.rate[duca] if knobs.R is None else knobs.R
    score = knobs.score or family.base[duca]
    partial, modules = set(family.kinds) - {"attn"}, set(RATIOS[ratio].modules)
    if "cross_attn" not in partial and ("cross_attn" in modules or score == ENTROPY):
        raise UnsupportedModelError(
            f"ratio={ratio} and score={score} include a rule for cross_attn sites, and there are none "
            "here. Leave out these knobs, or use --policy soda."
        )
    if not partial <= modules:
        raise BudgetError(
            f"Knob ratio is {ratio}, which has no share for {', '.join(sorted(partial - modules))}; "
            f"expected one of {', '.join(r for r in RATIOS if partial <= set(RATIOS[r].modules))}."
        )
    return replace(knobs, N=period, R=rate, score=score, ratio=ratio)


def _token_rule(family: Family, knobs: ToCaKnobs, sampler: Sampler, duca: bool) -> TokenRule:
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


def _draw(transformer: Transformer, types: Sequence[Step], counter: Sequence[int], ratio: str, rate: float) -> Plan:
    """Returns the plan of these steps: F is C; T is R in self-attention and P elsewhere; A is S over '-'.

    P stays P at k = 0 and at all tokens. In a mixed step layer 0 is C, under S for its cache only.
    """
    layers = 1 + max(site.layer for site in transformer.sites)
    tokens = cache(lambda kind, count: RATIOS[ratio].tokens(kind, rate, counter, layers, count))  # k [T, L]
    rows, ks = {}, {}
    for site in transformer.sites:
        letters = "".join(step[site.layer > 0][KINDS.index(site.kind)] for step in types)
        partial = "R" if site.kind == "attn" else "P"
        rows[site.key] = letters.translate(str.maketrans("FTA", f"C{partial}-"))
        if "P" in rows[site.key]:
            k = tokens(site.kind, site.tokens)[:, site.layer]
            ks[site.key] = tuple(k[[letter == "T" for letter in letters]].tolist())
    stack = "".join("S" if step[layers > 1][-1] == "A" else "." for step in types)
    skips = tuple(Forecast((stack.rindex(".", 0, t),), (1.0,), "output") for t, a in enumerate(stack) if a == "S")
    return Plan(transformer.class_name, transformer.fingerprint, rows, stack, ks, stack_forecasts=skips)


def _rate(problem: Problem, drawn: Callable[[float], Schedule], period: int) -> float:
    """Returns the R in [0, 2] of smallest speed-up that meets the budget, the largest of equals, for numbers of tokens are whole.

    R is bisected above 0, where more tokens cost more. R = 0 is a case of its own, for it changes which steps are full.
    """

    def at(millionths: int) -> Schedule:
        return drawn(millionths / 1_000_000)

    most = bisect_left(range(1, MOST_R + 1), True, key=lambda millionths: not problem.meets(at(millionths)))
    meeting = [millionths for millionths in (most, 0) if problem.meets(at(millionths))]
    if not meeting:
        cheapest = max(at(0), at(1), key=problem.speedup)
        raise problem.unreachable(cheapest, f" with N={period}", ", or set a larger --knob N")
    return min(meeting, key=lambda millionths: problem.speedup(at(millionths))) / 1_000_000
