"""ToCa and DuCa against what their authors published: steps, ratios, token rules and FLOPs, by arithmetic alone.

Counters `s` and FLOP rules are those of the published code; DiT's counter runs down, the others up.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from sodaprof.compiler.knobs import read_knobs
from sodaprof.compiler.policies import POLICIES
from sodaprof.compiler.policies.toca import ToCaKnobs, compile_toca
from sodaprof.compiler.problem import Problem
from sodaprof.errors import BudgetError, MismatchError, UnsupportedModelError
from sodaprof.formats.rules import verify
from sodaprof.formats.schedule import Plan, Schedule
from sodaprof.formats.sites import Guidance, Model, Site, Transformer
from tests.conftest import build_cost, build_model, build_sampler

LAYERS, WIDTH = 28, 1152
COMPILE = ("toca", "duca")
STACKS = {"PixArtTransformer2DModel": ("transformer_blocks",), "STDiT3": ("spatial_blocks", "temporal_blocks")}
MODULES = {
    "PixArtTransformer2DModel": (("attn1", "attn"), ("attn2", "cross_attn"), ("ff", "mlp")),
    "STDiT3": (("attn", "attn"), ("cross_attn", "cross_attn"), ("mlp", "mlp")),
}
OPENSORA_TOKENS = 15 * 1600  # 51 frames of 480p: 15 latent frames of 30 x 53 tokens or so
DDIM_FULL = [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
DDIM_ONCE = sorted([*DDIM_FULL, 45, 32], reverse=True)  # both mixed steps are full
DUCA_SKIPPED = [47, 42, 38, 34, 29, 26, 23, 20]
DDPM_FULL = [
    249,
    *range(240, 209, -6),
    *range(205, 159, -5),
    *range(152, 95, -4),
    *range(94, 47, -2),
    *range(45, -1, -3),
]


def dit(layers: int = LAYERS, tokens: int = 256) -> Model:
    """Returns a model of DiT-XL/2's shapes."""
    model = build_model(layers=layers, tokens=tokens)
    sites = tuple(replace(site, width=WIDTH) for site in model.transformers["t"].sites)
    fingerprint = model.transformers["t"].fingerprint | {"heads": 16, "head_width": 72}
    return replace(model, transformers={"t": Transformer("DiTTransformer2DModel", fingerprint, sites)})


def with_text(class_name: str, tokens: int) -> Model:
    """Returns a model with cross-attention; STDiT3 runs a spatial and a temporal block by turns."""
    stacks, modules = STACKS[class_name], MODULES[class_name]
    sites = tuple(
        Site(stack, layer, module, kind, tokens, WIDTH, True)
        for layer in range(LAYERS)
        for stack in stacks
        for module, kind in modules
    )
    kinds = {f"{stack}.{module}": kind for stack in stacks for module, kind in modules}
    fingerprint = {"layers": LAYERS, "tokens": dict.fromkeys(kinds, tokens), "kinds": kinds}
    shape = {"latent": [4, 32, 32], "tokens": tokens, "batch_profiled": 1, "dtype": "float32"}
    return Model("text", "TextPipeline", {"t": Transformer(class_name, fingerprint, sites)}, shape)


DIT, SMALL = dit(), dit(layers=4)
PIXART, OPENSORA = with_text("PixArtTransformer2DModel", 256), with_text("STDiT3", OPENSORA_TOKENS)


def draw(policy: str, model: Model, steps: int, budget: float = 0, **knobs: Any) -> Schedule:
    """Returns a legal schedule."""
    chosen, problem = POLICIES[policy], Problem(model, build_sampler(steps), build_cost(model), budget)
    schedule = chosen.compile(problem, read_knobs(policy, chosen.knobs, knobs))
    verify(schedule)
    return schedule


def plan_of(schedule: Schedule) -> Plan:
    return schedule.transformers["t"]


def words(schedule: Schedule, part: int = 1) -> list[str]:
    """Returns one word a step, one letter a layer (part 1 of a site) or module (2): F, T or A by the published names.

    All sites of a layer or module must agree.
    """
    rows: dict[str, str] = {}
    for site, row in plan_of(schedule).rows.items():
        letters = row.translate(str.maketrans("CRP-", "FTTA"))
        assert rows.setdefault(site.split(".")[part], letters) == letters
    return ["".join(column) for column in zip(*rows.values(), strict=True)]


def k_at(schedule: Schedule, site: str, step: int) -> int:
    plan = plan_of(schedule)
    return plan.k[site][plan.cell(site, step, "P")]


ALL, PARTIAL, NONE = "F" * LAYERS, "T" * LAYERS, "A" * LAYERS
MIXED, MIXED_SKIPPED = "F" + PARTIAL[1:], "F" + NONE[1:]

# ---- step types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "steps", "knobs", "expected"),
    [
        ("toca", 50, {}, {ALL: DDIM_FULL, MIXED: [45, 32]}),
        ("duca", 50, {}, {ALL: DDIM_FULL, MIXED: [45], MIXED_SKIPPED: [32], NONE: DUCA_SKIPPED}),
        ("toca", 250, {}, {ALL: DDPM_FULL, MIXED: [245, 155]}),
        ("toca", 50, {"once_per_step": 1}, {ALL: DDIM_ONCE}),
        ("duca", 50, {"once_per_step": 1}, {ALL: DDIM_ONCE, NONE: DUCA_SKIPPED}),
        ("duca", 1, {}, {ALL: [0]}),
        # R = 0 is FORA with a full last step: neither band nor drift of the period
        ("toca", 50, {"R": 0}, {ALL: [49, *range(48, -1, -3)]}),
        ("toca", 50, {"R": 0, "N": 1}, {ALL: [*range(49, -1, -1)]}),
        # at counter 6 the period is 2 / 0.8 = 2.5, half to even 2; in double it is 2.5000000000000004, so 3
        ("toca", 8, {"N": 2}, {ALL: [7, 6, 4, 2, 0]}),
    ],
    ids=str,
)
def test_the_steps_of_dit_are_the_published_ones(policy, steps, knobs, expected):
    """By the value of the counter, which runs down; all other steps are partial."""
    found = words(draw(policy, DIT, steps, **knobs))
    at = {word: [steps - 1 - t for t, one in enumerate(found) if one == word] for word in found}
    assert at | {PARTIAL: None} == expected | {PARTIAL: None}


@pytest.mark.parametrize(
    ("policy", "knobs", "expected"),
    [
        ("toca", {}, {ALL: [0, 6, 9, 12, 15, 18], MIXED: [4]}),
        ("duca", {}, {ALL: [*range(0, 20, 3)], NONE: [*range(2, 20, 3)]}),
        ("toca", {"once_per_step": "1"}, {ALL: [0, 4, 6, 9, 12, 15, 18]}),
        ("toca", {"R": 0}, {ALL: [*range(0, 20, 3)]}),
    ],
    ids=str,
)
def test_the_steps_of_pixart_are_the_published_ones(policy, knobs, expected):
    """By the value of the counter, which is the step; all other steps are partial."""
    found = words(draw(policy, PIXART, 20, **knobs))
    at = {word: [t for t, one in enumerate(found) if one == word] for word in found}
    assert at | {PARTIAL: None} == expected | {PARTIAL: None}


@pytest.mark.parametrize(("policy", "third"), [("toca", "TTT"), ("duca", "AAA")])
def test_the_steps_of_opensora_are_the_published_ones(policy, third):
    """Letters of attn, cross_attn, mlp. N stretches the published constants 3 and 6."""
    schedule = draw(policy, OPENSORA, 30)
    assert words(schedule, 2)[:3] == ["FFF"] * 3
    assert words(schedule, 2)[3:] == ["FTF", "TTT", third, "FFF", "TTT", third] * 4 + ["FTF", "TTT", third]
    assert plan_of(schedule).stack == "." * 3 + ("..S" if policy == "duca" else "...") * 9
    stretched = words(draw(policy, OPENSORA, 12, N=4), 2)
    assert stretched == ["FFF"] * 3 + ["TTT", "FTF", "TTT", third, "TTT", "FFF", "TTT", third, "TTT"]


def test_a_step_that_skips_the_stack_takes_the_newest_output_of_a_step_that_ran():
    """A mixed one computes layer 0 for its caches alone."""
    for knobs in ({}, {"N": 7}):
        plan = plan_of(draw("duca", DIT, 50, **knobs))
        steps = [t for t, action in enumerate(plan.stack) if action == "S"]
        for t, cell in zip(steps, plan.stack_forecasts, strict=True):
            assert (cell.sources, cell.weights, cell.form) == ((plan.stack.rindex(".", 0, t),), (1.0,), "output")
    plan = plan_of(draw("duca", DIT, 50))
    assert [49 - t for t, action in enumerate(plan.stack) if action == "S"] == sorted([*DUCA_SKIPPED, 32], reverse=True)
    assert {site for site, row in plan.rows.items() if row[49 - 32] == "C"} == {"blocks.0.attn1", "blocks.0.ff"}


def test_a_single_layer_has_no_mixed_steps():
    found = words(draw("duca", dit(layers=1), 50))
    assert [49 - t for t, word in enumerate(found) if word == "F"] == DDIM_ONCE


# ---- tokens -----------------------------------------------------------------------------------------------------------

FF = "blocks.{}.ff".format


@pytest.mark.parametrize(
    ("steps", "counter", "shares"),
    [
        (50, 25, (0.140, 0.174, 0.210)),
        (50, 1, (0.409, 0.507, 0.613)),
        (250, 248, (0.191, 0.109, 0.021)),
        (250, 1, (0.440, 0.252, 0.049)),
    ],
)
def test_dit_ratios(steps, counter, shares):
    """Published ratios at layers 0, 13, 27, from k of 100 000 tokens."""
    schedule = draw("toca", dit(tokens=100_000), steps)
    for layer, share in zip((0, 13, 27), shares, strict=True):
        assert k_at(schedule, FF(layer), steps - 1 - counter) / 100_000 == pytest.approx(share, abs=6e-4)


def test_ddim_recomputes_no_token_in_the_first_quarter():
    schedule = draw("toca", DIT, 50)
    for t, word in enumerate(words(schedule)):
        if word == PARTIAL:
            assert (k_at(schedule, FF(0), t) == 0) == (49 - t > 0.75 * 50)
    assert k_at(schedule, FF(27), 1) == 0  # a P all the same: its tokens age
    assert {k for ks in plan_of(draw("toca", DIT, 50, R=0)).k.values() for k in ks} == {0}


@pytest.mark.parametrize(
    ("rate", "step", "cross", "mlp"),
    [
        (0.3, 1, (0.52, 0.39, 0.26, 0.13), (1, 1, 0.70, 0.35)),
        (0.3, 19, (0.05, 0.04, 0.03, 0.01), (0.15, 0.11, 0.07, 0.04)),
        (0.75, 1, (1, 0.98, 0.65, 0.33), (1, 1, 1, 0.87)),
    ],
)
def test_pixart_ratios(rate, step, cross, mlp):
    schedule = draw("toca", with_text("PixArtTransformer2DModel", 10_000), 20, R=rate)
    for i, layer in enumerate((0, 9, 18, 27)):
        assert k_at(schedule, f"transformer_blocks.{layer}.attn2", step) / 1e4 == pytest.approx(cross[i], abs=5.1e-3)
        assert k_at(schedule, f"transformer_blocks.{layer}.ff", step) / 1e4 == pytest.approx(mlp[i], abs=5.1e-3)


@pytest.mark.parametrize("policy", COMPILE)
def test_opensora_ratios(policy):
    """0.1495 of the tokens of feed-forwards; none of cross-attention, whose ratio is below 0; self-attention is reused."""
    plan = plan_of(draw(policy, OPENSORA, 30))
    for site, ks in plan.k.items():
        assert set(ks) == ({0} if site.endswith("cross_attn") else {int(0.1495 * OPENSORA_TOKENS)})
    assert not any("P" in row for site, row in plan.rows.items() if site.endswith(".attn"))


def test_k_is_a_float32_product_rounded_down():
    """At R = 0.3, counter 20, layer 0 the share is 0.84 of 100 tokens, in double 83.99999999999999."""
    schedule = draw("toca", dit(tokens=100), 50, R=0.3)
    assert k_at(schedule, FF(0), 49 - 20) == 84


def test_ratios_follow_the_depth_of_the_model():
    """The published code has 27 for the last layer; here it is the last layer of any model."""
    deep, shallow = draw("toca", DIT, 50), draw("toca", SMALL, 50)
    for t in (24, 48):
        for layer, same in ((0, 0), (27, 3), (9, 1)):
            assert k_at(deep, FF(layer), t) == k_at(shallow, FF(same), t)


def test_a_partial_cell_is_a_prune_even_at_all_tokens():
    schedule = draw("toca", PIXART, 20)
    for site, row in plan_of(schedule).rows.items():
        assert set(row) == ({"C", "R"} if site.endswith("attn1") else {"C", "P"})
    assert k_at(schedule, "transformer_blocks.0.ff", 1) == 256


@pytest.mark.parametrize(
    ("policy", "model", "expected", "rate"),
    [
        ("toca", DIT, ("attention_received", 0.6, 2, False), 0.07),
        ("duca", DIT, ("attention_received", 0.8, 2, False), 0.05),
        ("toca", PIXART, ("cross_attention_entropy", 0.4, 4, True), 0.3),
        ("duca", PIXART, ("cross_attention_entropy", 0.4, 4, True), 0.75),
        ("toca", OPENSORA, ("cross_attention_entropy", 0.0, 1, True), 0.1),
        ("duca", OPENSORA, ("value_norm", 0.0, 1, False), 0.1),
    ],
)
def test_the_released_token_rules_and_ratios(policy, model, expected, rate):
    schedule = draw(policy, model, 30)
    rule, knobs = schedule.token_rule, schedule.policy["knobs"]
    assert (rule.base, rule.bonus, rule.bonus_grid, rule.share_halves) == expected
    assert (rule.age_weight, rule.age_period, rule.seed) == (0.25, 3.0, 0)
    assert (knobs["N"], knobs["R"], knobs["score"], knobs["once_per_step"]) == (3, rate, expected[0], 0)
    assert draw(policy, model, 1).token_rule is None


def test_knobs_of_the_token_rule():
    rule = draw("toca", DIT, 50, N=5, lambda3=0.5, score="random").token_rule
    assert (rule.base, rule.age_weight, rule.age_period, rule.bonus) == ("random", 0.5, 5.0, 0.6)
    assert rule.share_halves  # one draw for both halves
    assert draw("toca", DIT, 250).token_rule.age_period == 4.0
    norms = [draw("toca", model, 20, score="value_norm").token_rule for model in (DIT, PIXART, OPENSORA)]
    assert [one.share_halves for one in norms] == [False, True, False]


@pytest.mark.parametrize("form", ["none", "passes"])
def test_nothing_is_shared_if_no_batch_holds_both_halves(form):
    sampler = replace(build_sampler(20), guidance=Guidance(form, 4.0))
    schedule = compile_toca(Problem(PIXART, sampler, build_cost(PIXART), 0), ToCaKnobs())
    assert not schedule.token_rule.share_halves


# ---- FLOPs ------------------------------------------------------------------------------------------------------------


def dit_flops(schedule: Schedule) -> float:
    """TFLOPs of the blocks by the published code's rules, both guidance halves; from the rows alone."""
    b, n, c, h = 2, 256, WIDTH, 16
    plan = plan_of(schedule)
    every = 2 * b * n * c + b * c + 6 * b * c**2
    full = (
        every
        + (8 * b * n * c**2 + b * n * c + 4 * b * n**2 * c + 5 * b * h * n**2)
        + 16 * b * n * c**2
        + 24 * b * n * c
    )
    total = 0
    for layer in range(LAYERS):
        attn, ff = plan.rows[f"blocks.{layer}.attn1"], plan.rows[FF(layer)]
        for t in range(schedule.steps):
            if attn[t] == "C":
                assert ff[t] == "C"
                total += full
            elif ff[t] == "P":
                total += every + (16 * c + 24) * b * k_at(schedule, FF(layer), t) * c
            else:
                assert (attn[t], ff[t], plan.stack[t]) == ("-", "-", "S")
    return total / 1e12


@pytest.mark.parametrize(
    ("policy", "steps", "knobs", "expected"),
    [
        ("toca", 50, {"N": 1, "R": 0}, 23.735),
        ("toca", 50, {}, 10.233),
        ("duca", 50, {}, 9.575),
        ("toca", 50, {"once_per_step": 1}, 11.125),
        ("duca", 50, {"once_per_step": 1}, 10.490),
        ("toca", 250, {"N": 1, "R": 0}, 118.68),
        ("toca", 250, {}, 43.42),
        ("toca", 250, {"once_per_step": 1}, 44.26),
    ],
    ids=str,
)
def test_dit_flops_are_the_published_ones(policy, steps, knobs, expected):
    digits = len(str(expected).split(".")[1]) if expected != 10.490 else 3
    assert round(dit_flops(draw(policy, DIT, steps, **knobs)), digits) == expected


def opensora_flops(schedule: Schedule, frames: int = 15, spatial: int = 1600, text: int = 120) -> float:
    """Multiply-adds of the STDiT3 blocks of one guidance half, in units of width²; partial cells pay their tokens.

    Self-attention: 4 C² a token for qkv and projection, 2 C · sequence for the scores and the sum over values (1600
    tokens of a frame, 15 frames of a place). Cross-attention: 2 C² a token for query and projection, 2 C · text for the
    map, 2 C² a text token for keys and values. Feed-forward 8 C². Modulation, norms and embeddings are left out.
    """
    n, plan = frames * spatial, plan_of(schedule)
    full = {
        "spatial_blocks.attn": n * (4 + 2 * spatial / WIDTH),
        "temporal_blocks.attn": n * (4 + 2 * frames / WIDTH),
        "cross_attn": n * (2 + 2 * text / WIDTH) + 2 * text,
        "mlp": 8 * n,
    }
    total = 0.0
    for site, row in plan.rows.items():
        stack, _, module = site.split(".")
        cost = full[f"{stack}.attn" if module == "attn" else module]
        total += row.count("C") * cost + sum(plan.k.get(site, ())) / n * cost
    return total


@pytest.mark.parametrize(("policy", "expected"), [("toca", 2.36), ("duca", 2.49)])
def test_opensora_flops_are_close_to_the_published_ones(policy, expected):
    schedule = draw(policy, OPENSORA, 30)
    plan = plan_of(schedule)
    full = replace(plan, rows=dict.fromkeys(plan.rows, "C" * 30), k={})
    ratio = opensora_flops(replace(schedule, transformers={"t": full})) / opensora_flops(schedule)
    assert ratio == pytest.approx(expected, rel=0.02)


# ---- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", COMPILE)
@pytest.mark.parametrize("budget", [1.8, 2.0, 2.05])
def test_a_budget_chooses_the_ratio(policy, budget):
    """A millionth more R would be too slow."""
    cost, schedule = build_cost(SMALL), draw(policy, SMALL, 50, budget)
    rate = schedule.policy["knobs"]["R"]
    assert budget <= cost.speedup(schedule) < budget * 1.01
    assert schedule.predicted["speedup"] == cost.speedup(schedule)
    assert cost.speedup(draw(policy, SMALL, 50, R=rate + 1e-6)) < budget
    assert draw(policy, SMALL, 50, R=rate).digest() == schedule.digest()


def test_a_budget_of_1_takes_the_most_tokens():
    assert draw("toca", PIXART, 20, 1.0).policy["knobs"]["R"] == 2.0


def test_a_budget_that_only_reuse_meets():
    """Without tokens the period is constant and full steps are fewer: R = 0 reaches what no R above it does."""
    least, none = (build_cost(SMALL).speedup(draw("toca", SMALL, 50, R=r)) for r in (1e-6, 0))
    assert least < none
    assert draw("toca", SMALL, 50, (least + none) / 2).policy["knobs"]["R"] == 0.0


def test_budgets_that_cannot_be_met():
    most = build_cost(SMALL).speedup(draw("toca", SMALL, 50, R=0))
    with pytest.raises(BudgetError, match=rf"5x cannot be met with N=3: at most {most:.3g}x .* larger --knob N"):
        draw("toca", SMALL, 50, 5.0)
    assert draw("toca", SMALL, 50, 5.0, N=12).predicted["speedup"] >= 5.0
    assert draw("toca", SMALL, 50, 2.0, R=0.05).policy["knobs"]["R"] == 0.05
    with pytest.raises(BudgetError, match=r"R=0\.9 with N=3 gives 1\.\d+x, the budget is 2x"):
        draw("toca", SMALL, 50, 2.0, R=0.9)


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_a_schedule_of_ratios_brings_its_own_period():
    assert draw("toca", DIT, 50, ratio="ddpm250").policy["knobs"]["N"] == 4
    assert draw("toca", DIT, 250, ratio="ddim50").policy["knobs"]["N"] == 3
    assert [draw("toca", SMALL, n).policy["knobs"]["ratio"] for n in (100, 101)] == ["ddim50", "ddpm250"]


@pytest.mark.parametrize(
    ("knobs", "found"),
    [
        ({"N": 0}, "Knob N is 0; expected at least 1"),
        ({"R": -0.1}, "Knob R is -0.1; expected at least 0"),
        ({"once_per_step": 2}, "once_per_step is 2; expected one of 0, 1"),
        ({"score": "loud"}, "'loud'; expected one of feature_mean"),
        ({"ratio": ""}, "''; expected one of ddim50, ddpm250, pixart, opensora"),
        ({"k": 3}, "no knob 'k'; it has N, R, score"),
    ],
    ids=str,
)
def test_wrong_knobs(knobs, found):
    with pytest.raises(BudgetError, match=found):
        draw("toca", SMALL, 50, **knobs)


def test_ratios_and_scores_of_sites_that_the_model_lacks():
    for knobs in ({"ratio": "pixart"}, {"ratio": "opensora"}, {"score": "cross_attention_entropy"}):
        with pytest.raises(UnsupportedModelError, match="Leave out these knobs"):
            draw("toca", DIT, 50, **knobs)
    with pytest.raises(BudgetError, match="no share for cross_attn; expected one of pixart, opensora"):
        draw("toca", PIXART, 20, ratio="ddim50")


@pytest.mark.parametrize("policy", COMPILE)
def test_other_models_are_refused(policy):
    transformer = SMALL.transformers["t"]
    fixed = tuple(replace(site, prunable=site.kind != "mlp") for site in transformer.sites)
    refused = [(build_model(), r"runs a DiT; .* Use --policy soda")]
    refused += [(build_model(names=("high", "low")), "several transformers")]
    for changed, message in [
        (replace(transformer, class_name="STDiT3"), r"need attn, cross_attn, mlp\. Use --policy soda"),
        (replace(transformer, sites=fixed), r"blocks\.0\.ff cannot recompute .* Use --policy soda"),
    ]:
        refused.append((replace(SMALL, transformers={"t": changed}), message))
    for model, message in refused:
        with pytest.raises(UnsupportedModelError, match=message):
            draw(policy, model, 50)
    with pytest.raises(MismatchError):
        Problem(DIT, build_sampler(50), build_cost(SMALL), 2.0)
