"""ToCa and DuCa against what their authors published: steps, ratios, token rules and FLOPs, by arithmetic alone.

Counters `s` and FLOP rules are those of the published code; DiT's counter runs down, the others up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from sodaprof import load_schedule
from sodaprof.compiler.knobs import read_knobs
from sodaprof.compiler.policies import POLICIES
from sodaprof.compiler.policies.toca import FAMILIES, RATIOS, ToCaKnobs, compile_toca
from sodaprof.compiler.problem import Problem
from sodaprof.errors import BudgetError, MismatchError, UnsupportedModelError
from sodaprof.formats.rules import verify
from sodaprof.formats.schedule import Plan, Schedule
from sodaprof.formats.sites import Guidance, Model, Site, Transformer

LAYERS, WIDTH = 28, 1152
COMPILE = ("toca", "duca")
STACKS = {"PixArtTransformer2DModel": ("transformer_blocks",), "STDiT3": ("spatial_blocks", "temporal_blocks")}
MODULES = {
    "PixArtTransformer2DModel": (("attn1", "attn"), ("attn2", "cross_attn"), ("ff", "mlp")),
    "STDiT3": (("attn", "attn"), ("cross_attn", "cross_attn"), ("mlp", "mlp")),
}
OPENSORA_TOKENS = 15 * 1600  # 51 frames of 480p: 15 latent frames of 30 x 53 tokens or so
DDIM_FULL = [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
DUCA_SKIPPED = [47, 42, 38, 34, 29, 26, 23, 20]
DDPM_FULL = [
    249,
    *range(240, 209, -6),
    *range(205, 159, -5),
    *range(152, 95, -4),
    *range(94, 47, -2),
    *range(45, -1, -3),
]


@pytest.fixture
def dit(make_model) -> Callable[..., Model]:
    """A function (layers, tokens) -> a model of DiT-XL/2's shapes."""

    def make(layers: int = LAYERS, tokens: int = 256) -> Model:
        model = make_model(layers=layers, tokens=tokens)
        sites = tuple(replace(site, width=WIDTH) for site in model.transformers["t"].sites)
        fingerprint = model.transformers["t"].fingerprint | {"heads": 16, "head_width": 72}
        return replace(model, transformers={"t": Transformer("DiTTransformer2DModel", fingerprint, sites)})

    return make


def with_text(class_name: str, tokens: int, layers: int = LAYERS) -> Model:
    """Returns a model with cross-attention; STDiT3 runs a spatial and a temporal block by turns."""
    stacks, modules = STACKS[class_name], MODULES[class_name]
    sites = tuple(
        Site(stack, layer, module, kind, tokens, WIDTH, True)
        for layer in range(layers)
        for stack in stacks
        for module, kind in modules
    )
    fingerprint = {
        "layers": layers,
        "tokens": {f"{stack}.{module}": tokens for stack in stacks for module, _ in modules},
        "kinds": {f"{stack}.{module}": kind for stack in stacks for module, kind in modules},
    }
    shape = {"latent": [4, 32, 32], "tokens": tokens, "batch_profiled": 1, "dtype": "float32"}
    return Model("text", "TextPipeline", {"t": Transformer(class_name, fingerprint, sites)}, shape)


@pytest.fixture
def pixart() -> Model:
    return with_text("PixArtTransformer2DModel", 256)


@pytest.fixture
def opensora() -> Model:
    return with_text("STDiT3", OPENSORA_TOKENS)


@pytest.fixture
def draw(make_sampler, make_cost) -> Callable[..., Schedule]:
    """A function (policy, model, steps, budget, **knobs) -> a legal schedule."""

    def make(policy: str, model: Model, steps: int, budget: float = 0, **knobs: Any) -> Schedule:
        chosen, problem = POLICIES[policy], Problem(model, make_sampler(steps), make_cost(model), budget)
        schedule = chosen.compile(problem, read_knobs(policy, chosen.knobs, knobs))
        verify(schedule)
        return schedule

    return make


def plan_of(schedule: Schedule) -> Plan:
    return schedule.transformers["t"]


def letter(plan: Plan, site: str, step: int) -> str:
    """Returns F, T or A: what a site does by the published code's names."""
    return {"C": "F", "R": "T", "P": "T", "-": "A"}[plan.rows[site][step]]


def columns(schedule: Schedule) -> list[str]:
    """Returns one word a step, one letter a layer; all sites of a layer must agree."""
    plan, words = plan_of(schedule), []
    by_layer: dict[int, list[str]] = {}
    for site in plan.rows:
        by_layer.setdefault(int(site.split(".")[1]), []).append(site)
    for step in range(schedule.steps):
        layers = [{letter(plan, site, step) for site in by_layer[i]} for i in sorted(by_layer)]
        assert all(len(letters) == 1 for letters in layers)
        words.append("".join(letters.pop() for letters in layers))
    return words


def countdown(schedule: Schedule, word: str) -> list[int]:
    """Returns the values of DiT's counter at the steps of this word."""
    return [schedule.steps - 1 - t for t, found in enumerate(columns(schedule)) if found == word]


def k_at(schedule: Schedule, site: str, step: int) -> int:
    plan = plan_of(schedule)
    return plan.k[site][plan.cell(site, step, "P")]


ALL, PARTIAL, NONE = "F" * LAYERS, "T" * LAYERS, "A" * LAYERS
MIXED, MIXED_SKIPPED = "F" + PARTIAL[1:], "F" + NONE[1:]

# ---- step types -------------------------------------------------------------------------------------------------------


def test_toca_ddim_50(dit, draw):
    schedule = draw("toca", dit(), 50)
    assert countdown(schedule, ALL) == DDIM_FULL
    assert countdown(schedule, MIXED) == [45, 32]
    assert countdown(schedule, PARTIAL) == sorted(set(range(50)) - {*DDIM_FULL, 45, 32}, reverse=True)
    assert plan_of(schedule).stack == "." * 50
    knobs = {"N": 3, "R": 0.07, "score": "attention_received", "ratio": "ddim50", "once_per_step": 0, "lambda3": 0.25}
    assert schedule.policy == {"name": "toca", "knobs": knobs}


def test_duca_ddim_50(dit, draw):
    schedule = draw("duca", dit(), 50)
    plan = plan_of(schedule)
    assert countdown(schedule, ALL) == DDIM_FULL
    assert countdown(schedule, MIXED) == [45]
    assert countdown(schedule, MIXED_SKIPPED) == [32]
    assert countdown(schedule, NONE) == DUCA_SKIPPED
    skipped = sorted(49 - s for s in [*DUCA_SKIPPED, 32])
    assert [t for t in range(50) if plan.stack[t] == "S"] == skipped
    assert schedule.policy["knobs"]["R"] == 0.05


def test_skipped_steps_take_the_newest_output_of_the_stack(dit, draw):
    """Of the latest step that itself ran, whatever the period."""
    for knobs in ({}, {"N": 7}):
        plan = plan_of(draw("duca", dit(), 50, **knobs))
        cells = iter(plan.stack_forecasts)
        for t, action in enumerate(plan.stack):
            if action == "S":
                cell = next(cells)
                assert (cell.sources, cell.weights, cell.form) == ((plan.stack.rindex(".", 0, t),), (1.0,), "output")
        assert next(cells, None) is None
    first = plan_of(draw("duca", dit(), 50)).stack_forecasts[0]
    assert first.sources == (1,)  # counter 47 takes the output of 48


def test_toca_ddpm_250(dit, draw):
    schedule = draw("toca", dit(), 250)
    assert len(DDPM_FULL) == 72
    assert countdown(schedule, ALL) == DDPM_FULL
    assert countdown(schedule, MIXED) == [245, 155]
    assert set(columns(schedule)) == {ALL, MIXED, PARTIAL}
    assert {key: schedule.policy["knobs"][key] for key in ("N", "R", "ratio")} == {
        "N": 4,
        "R": 0.07,
        "ratio": "ddpm250",
    }


def test_pixart_toca_20(pixart, draw):
    words = columns(draw("toca", pixart, 20))
    assert [s for s in range(20) if words[s] == ALL] == [0, 6, 9, 12, 15, 18]
    assert [s for s in range(20) if words[s] == MIXED] == [4]
    assert words.count(PARTIAL) == 13


def test_pixart_duca_20(pixart, draw):
    words = columns(draw("duca", pixart, 20))
    assert words == [ALL, PARTIAL, NONE] * 6 + [ALL, PARTIAL]


def opensora_letters(schedule: Schedule) -> list[str]:
    """Returns attn, cross_attn, mlp a step; both stacks and all layers must agree."""
    plan = plan_of(schedule)
    words = []
    for t in range(schedule.steps):
        found = [
            {letter(plan, site, t) for site in plan.rows if site.endswith(f".{m}")}
            for m in ("attn", "cross_attn", "mlp")
        ]
        assert all(len(letters) == 1 for letters in found)
        words.append("".join(letters.pop() for letters in found))
    return words


@pytest.mark.parametrize(("policy", "third"), [("toca", "TTT"), ("duca", "AAA")])
def test_opensora_30(opensora, draw, policy, third):
    schedule = draw(policy, opensora, 30)
    words = opensora_letters(schedule)
    assert words[:3] == ["FFF"] * 3
    assert words[3:] == ["FTF", "TTT", third, "FFF", "TTT", third] * 4 + ["FTF", "TTT", third]
    assert plan_of(schedule).stack == "." * 3 + ("..S" if policy == "duca" else "...") * 9


def test_opensora_sites_run_by_turns(opensora, draw):
    sites = list(plan_of(draw("toca", opensora, 30)).rows)
    assert sites[:4] == ["spatial_blocks.0.attn", "spatial_blocks.0.cross_attn", "spatial_blocks.0.mlp",
                         "temporal_blocks.0.attn"]  # fmt: skip


def test_opensora_other_periods(opensora, draw):
    """N stretches the published constants 3 and 6; partial steps at odd distances, skipped ones at even."""
    words = opensora_letters(draw("duca", opensora, 12, N=4))
    assert words == ["FFF"] * 3 + ["TTT", "FTF", "TTT", "AAA", "TTT", "FFF", "TTT", "AAA", "TTT"]


@pytest.mark.parametrize("policy", COMPILE)
def test_once_per_step_has_no_mixed_steps(dit, draw, policy):
    """The full steps of the published schedule, and both mixed ones whole."""
    schedule = draw(policy, dit(), 50, once_per_step=1)
    assert countdown(schedule, ALL) == sorted([*DDIM_FULL, 45, 32], reverse=True)
    assert set(columns(schedule)) == {ALL, PARTIAL} | ({NONE} if policy == "duca" else set())


def test_once_per_step_on_pixart(pixart, draw):
    words = columns(draw("toca", pixart, 20, once_per_step="1"))
    assert [s for s in range(20) if words[s] == ALL] == [0, 4, 6, 9, 12, 15, 18]
    assert set(words) == {ALL, PARTIAL}


def test_no_ratio_means_a_constant_period(dit, pixart, draw):
    """R = 0 is FORA with a full last step: neither band nor drift of the period, and no token."""
    schedule = draw("toca", dit(), 50, R=0)
    assert countdown(schedule, ALL) == [49, *range(48, -1, -3)]
    assert {k for ks in plan_of(schedule).k.values() for k in ks} == {0}
    assert columns(draw("toca", dit(), 50, R=0, N=1)) == [ALL] * 50
    assert columns(draw("toca", pixart, 20, R=0)) == ([ALL] + [PARTIAL] * 2) * 6 + [ALL, PARTIAL]


def test_periods_round_half_to_even_in_float32(dit, draw):
    """N = 2, T = 8: at counter 6 the period is 2 / 0.8 = 2.5, so 2; in double it is 2.5000000000000004, so 3.

    With 3, counter 4 would be partial and 3 mixed.
    """
    schedule = draw("toca", dit(), 8, N=2)
    assert countdown(schedule, ALL) == [7, 6, 4, 2, 0]
    assert countdown(schedule, MIXED) == []


def test_a_step_and_a_layer_of_one(dit, draw):
    only = draw("duca", dit(), 1)
    assert columns(only) == [ALL]
    assert only.token_rule is None
    words = columns(draw("duca", dit(layers=1), 50))
    assert [49 - t for t in range(50) if words[t] == "F"] == sorted([*DDIM_FULL, 45, 32], reverse=True)


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
def test_dit_ratios(dit, draw, steps, counter, shares):
    """Published ratios at layers 0, 13, 27, from k of 100 000 tokens."""
    schedule = draw("toca", dit(tokens=100_000), steps)
    for layer, share in zip((0, 13, 27), shares, strict=True):
        assert k_at(schedule, FF(layer), steps - 1 - counter) / 100_000 == pytest.approx(share, abs=6e-4)


def test_ddim_recomputes_no_token_in_the_first_quarter(dit, draw):
    schedule = draw("toca", dit(), 50)
    for t, word in enumerate(columns(schedule)):
        if word == PARTIAL:
            assert (k_at(schedule, FF(0), t) == 0) == (49 - t > 0.75 * 50)
    assert k_at(schedule, FF(27), 1) == 0  # a P all the same: its tokens age


@pytest.mark.parametrize(
    ("rate", "step", "cross", "mlp"),
    [
        (0.3, 1, (0.52, 0.39, 0.26, 0.13), (1, 1, 0.70, 0.35)),
        (0.3, 19, (0.05, 0.04, 0.03, 0.01), (0.15, 0.11, 0.07, 0.04)),
        (0.75, 1, (1, 0.98, 0.65, 0.33), (1, 1, 1, 0.87)),
    ],
)
def test_pixart_ratios(draw, rate, step, cross, mlp):
    schedule = draw("toca", with_text("PixArtTransformer2DModel", 10_000), 20, R=rate)
    for i, layer in enumerate((0, 9, 18, 27)):
        assert k_at(schedule, f"transformer_blocks.{layer}.attn2", step) / 1e4 == pytest.approx(cross[i], abs=5.1e-3)
        assert k_at(schedule, f"transformer_blocks.{layer}.ff", step) / 1e4 == pytest.approx(mlp[i], abs=5.1e-3)


@pytest.mark.parametrize("policy", COMPILE)
def test_opensora_ratios(opensora, draw, policy):
    """0.1495 of the tokens of feed-forwards; none of cross-attention, whose ratio is below 0."""
    plan = plan_of(draw(policy, opensora, 30))
    for site, ks in plan.k.items():
        assert set(ks) == ({0} if site.endswith("cross_attn") else {int(0.1495 * OPENSORA_TOKENS)})
    assert not any("P" in row for site, row in plan.rows.items() if site.endswith(".attn"))


def test_k_is_a_float32_product_rounded_down(dit, draw):
    """At R = 0.3, counter 20, layer 0 the share is 0.84 of 100 tokens, in double 83.99999999999999."""
    schedule = draw("toca", dit(tokens=100), 50, R=0.3)
    assert k_at(schedule, FF(0), 49 - 20) == 84


def test_ratios_follow_the_depth_of_the_model(dit, draw):
    """The published code has 27 for the last layer; here it is the last layer of any model."""
    deep, shallow = draw("toca", dit(), 50), draw("toca", dit(layers=4), 50)
    for t in (24, 48):
        assert k_at(deep, FF(0), t) == k_at(shallow, FF(0), t)
        assert k_at(deep, FF(27), t) == k_at(shallow, FF(3), t)
        assert k_at(deep, FF(9), t) == k_at(shallow, FF(1), t)


def test_partial_sites(pixart, draw):
    """Self-attention is reused, all other modules recompute some tokens; P also at all of them."""
    schedule = draw("toca", pixart, 20)
    plan = plan_of(schedule)
    for site, row in plan.rows.items():
        assert set(row) == ({"C", "R"} if site.endswith("attn1") else {"C", "P"})
    assert k_at(schedule, "transformer_blocks.0.ff", 1) == 256


def test_a_mixed_skipped_step_writes_the_caches_of_layer_0(dit, draw):
    plan = plan_of(draw("duca", dit(), 50))
    step = 49 - 32
    assert plan.stack[step] == "S"
    assert {site for site, row in plan.rows.items() if row[step] == "C"} == {"blocks.0.attn1", "blocks.0.ff"}


@pytest.mark.parametrize(
    ("policy", "class_name", "expected"),
    [
        ("toca", "DiTTransformer2DModel", ("attention_received", 0.6, 2, False)),
        ("duca", "DiTTransformer2DModel", ("attention_received", 0.8, 2, False)),
        ("toca", "PixArtTransformer2DModel", ("cross_attention_entropy", 0.4, 4, True)),
        ("duca", "PixArtTransformer2DModel", ("cross_attention_entropy", 0.4, 4, True)),
        ("toca", "STDiT3", ("cross_attention_entropy", 0.0, 1, True)),
        ("duca", "STDiT3", ("value_norm", 0.0, 1, False)),
    ],
)
def test_token_rules(dit, pixart, opensora, draw, policy, class_name, expected):
    model = {"D": dit(), "P": pixart, "S": opensora}[class_name[0]]
    rule = draw(policy, model, 30).token_rule
    assert (rule.base, rule.bonus, rule.bonus_grid, rule.share_halves) == expected
    assert (rule.age_weight, rule.age_period, rule.seed) == (0.25, 3.0, 0)


def test_knobs_of_the_token_rule(dit, pixart, opensora, draw):
    rule = draw("toca", dit(), 50, N=5, lambda3=0.5, score="random").token_rule
    assert (rule.base, rule.age_weight, rule.age_period, rule.bonus) == ("random", 0.5, 5.0, 0.6)
    assert rule.share_halves  # one draw for both halves
    assert draw("toca", dit(), 250).token_rule.age_period == 4.0
    norms = {model.transformers["t"].class_name: draw("toca", model, 20, score="value_norm").token_rule.share_halves
             for model in (dit(), pixart, opensora)}  # fmt: skip
    assert norms == {"DiTTransformer2DModel": False, "PixArtTransformer2DModel": True, "STDiT3": False}


@pytest.mark.parametrize("form", ["none", "passes"])
def test_nothing_is_shared_where_no_batch_holds_both_halves(pixart, make_sampler, make_cost, form):
    sampler = replace(make_sampler(20), guidance=Guidance(form, 4.0))
    schedule = compile_toca(Problem(pixart, sampler, make_cost(pixart), 0), ToCaKnobs())
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
def test_dit_flops_are_the_published_ones(dit, draw, policy, steps, knobs, expected):
    digits = len(str(expected).split(".")[1]) if expected != 10.490 else 3
    assert round(dit_flops(draw(policy, dit(), steps, **knobs)), digits) == expected


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
def test_opensora_flops_are_close_to_the_published_ones(opensora, draw, policy, expected):
    schedule = draw(policy, opensora, 30)
    plan = plan_of(schedule)
    full = replace(plan, rows=dict.fromkeys(plan.rows, "C" * 30), k={})
    ratio = opensora_flops(replace(schedule, transformers={"t": full})) / opensora_flops(schedule)
    assert ratio == pytest.approx(expected, rel=0.02)


# ---- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", COMPILE)
@pytest.mark.parametrize("budget", [1.8, 2.0, 2.05])
def test_a_budget_chooses_the_ratio(dit, draw, make_cost, policy, budget):
    """A millionth more R would be too slow."""
    model = dit(layers=4)
    cost = make_cost(model)
    schedule = draw(policy, model, 50, budget)
    rate = schedule.policy["knobs"]["R"]
    assert budget <= cost.speedup(schedule) < budget * 1.01
    assert schedule.predicted["speedup"] == cost.speedup(schedule)
    assert cost.speedup(draw(policy, model, 50, R=rate + 1e-6)) < budget
    again = draw(policy, model, 50, R=rate)
    assert again.digest() == schedule.digest()


def test_a_budget_of_1_takes_the_most_tokens(pixart, draw):
    assert draw("toca", pixart, 20, 1.0).policy["knobs"]["R"] == 2.0


def test_a_budget_that_only_reuse_meets(dit, draw, make_cost):
    """Without tokens the period is constant and full steps are fewer: R = 0 reaches what no R above it does."""
    model = dit(layers=4)
    least, none = (make_cost(model).speedup(draw("toca", model, 50, R=r)) for r in (1e-6, 0))
    assert least < none
    assert draw("toca", model, 50, (least + none) / 2).policy["knobs"]["R"] == 0.0


def test_unreachable_budgets(dit, draw, make_cost):
    model = dit(layers=4)
    most = make_cost(model).speedup(draw("toca", model, 50, R=0))
    with pytest.raises(BudgetError, match=rf"5x cannot be met with N=3: at most {most:.3g}x .* larger --knob N"):
        draw("toca", model, 50, 5.0)
    assert draw("toca", model, 50, 5.0, N=12).predicted["speedup"] >= 5.0


def test_a_budget_holds_the_given_ratio_to_it(dit, draw):
    model = dit(layers=4)
    assert draw("toca", model, 50, 2.0, R=0.05).policy["knobs"]["R"] == 0.05
    with pytest.raises(BudgetError, match=r"R=0\.9 with N=3 gives 1\.\d+x, the budget is 2x"):
        draw("toca", model, 50, 2.0, R=0.9)


def test_a_cost_table_of_another_model(dit, make_sampler, make_cost):
    with pytest.raises(MismatchError):
        Problem(dit(), make_sampler(50), make_cost(dit(layers=4)), 2.0)


# ---- files and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", COMPILE)
@pytest.mark.parametrize("class_name", FAMILIES)
def test_schedules_are_read_back_equal(dit, pixart, opensora, draw, tmp_path, policy, class_name):
    model = {"D": dit(), "P": pixart, "S": opensora}[class_name[0]]
    schedule = draw(policy, model, 30)
    assert schedule.transformers["t"].class_name == class_name
    schedule.save(tmp_path / "schedule.json")
    read = load_schedule(tmp_path / "schedule.json")
    assert read == schedule
    assert read.digest() == schedule.digest()


def test_knobs_may_be_text(dit, draw):
    texts = {"N": "4", "R": "0.1", "ratio": "ddpm250", "score": "value_norm", "lambda3": "0", "once_per_step": "1"}
    values = {"N": 4, "R": 0.1, "ratio": "ddpm250", "score": "value_norm", "lambda3": 0.0, "once_per_step": 1}
    schedule = draw("duca", dit(), 50, **texts)
    assert schedule == draw("duca", dit(), 50, **values)
    assert schedule.policy == {"name": "duca", "knobs": values}


def test_a_schedule_of_ratios_brings_its_own_period(dit, draw):
    assert draw("toca", dit(), 50, ratio="ddpm250").policy["knobs"]["N"] == 4
    assert draw("toca", dit(), 250, ratio="ddim50").policy["knobs"]["N"] == 3
    assert [draw("toca", dit(layers=2), n).policy["knobs"]["ratio"] for n in (100, 101)] == ["ddim50", "ddpm250"]


@pytest.mark.parametrize(
    ("knobs", "found"),
    [
        ({"N": 0}, "Knob N is 0; expected at least 1"),
        ({"R": -0.1}, "Knob R is -0.1; expected at least 0"),
        ({"once_per_step": 2}, "once_per_step is 2; expected one of 0, 1"),
        ({"score": "loud"}, "'loud'; expected one of feature_mean"),
        ({"ratio": ""}, "''; expected one of ddim50"),
        ({"k": 3}, "no knob 'k'; it has N, R, score"),
    ],
    ids=str,
)
def test_wrong_knobs(dit, draw, knobs, found):
    with pytest.raises(BudgetError, match=found):
        draw("toca", dit(layers=1), 50, **knobs)


@pytest.mark.parametrize(
    "knobs", [{"ratio": "pixart"}, {"ratio": "opensora"}, {"score": "cross_attention_entropy"}], ids=str
)
def test_rules_for_cross_attention_need_such_sites(dit, draw, knobs):
    with pytest.raises(UnsupportedModelError, match="Leave out these knobs"):
        draw("toca", dit(), 50, **knobs)


def test_ratios_without_a_share_for_cross_attention(pixart, draw):
    with pytest.raises(BudgetError, match="no share for cross_attn; expected one of pixart, opensora"):
        draw("toca", pixart, 20, ratio="ddim50")
    assert set(RATIOS) == {"ddim50", "ddpm250", "pixart", "opensora"}


@pytest.mark.parametrize("policy", COMPILE)
def test_other_models_are_refused(make_model, dit, draw, policy):
    with pytest.raises(UnsupportedModelError, match=r"runs a DiT; .* Use --policy soda"):
        draw(policy, make_model(), 50)
    sites = dit().transformers["t"]
    for class_name in STACKS:
        model = replace(dit(), transformers={"t": replace(sites, class_name=class_name)})
        with pytest.raises(UnsupportedModelError, match=r"need attn, cross_attn, mlp\. Use --policy soda"):
            draw(policy, model, 50)
    with pytest.raises(UnsupportedModelError, match="several transformers"):
        draw(policy, make_model(names=("high", "low")), 50)


def test_feed_forwards_that_cannot_be_pruned(dit, draw):
    transformer = dit().transformers["t"]
    sites = tuple(replace(site, prunable=site.kind != "mlp") for site in transformer.sites)
    model = replace(dit(), transformers={"t": replace(transformer, sites=sites)})
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.ff cannot recompute .* Use --policy soda"):
        draw("toca", model, 50)
