"""What a schedule costs, by hand arithmetic; and the file that holds the costs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sodaprof.errors import FormatError, MismatchError
from sodaprof.formats.cost import CostModel, SiteCost, StepCost, TransformerCost, load_cost
from sodaprof.formats.schedule import Forecast, TokenRule
from tests.strategies import at, broken

ATTN0 = "transformer_blocks.0.attn1"
SITES = {f"transformer_blocks.{i}.{m}": m for i in range(2) for m in ("attn1", "ff")}
ATTN = SiteCost(60.0, 1.0, (2.0, 3.0, 4.0, 5.0), ((2, 20.0), (10, 40.0), (16, 60.0)))
FF = SiteCost(100.0, 2.0, (3.0, 4.0, 5.0, 6.0), ((1, 10.0), (16, 100.0)))
STEP = StepCost(fixed=20.0, all_cached=12.0, stack=(7.0, 8.0, 9.0, 10.0))
FULL = 20 + 60 + 100 + 60 + 100  # a step with every site C


def cost_of(transformers: dict[str, TransformerCost]) -> CostModel:
    return CostModel(
        unit="ms",
        device="cpu",
        dtype="float32",
        batch=1,
        tokens=16,
        transformers=transformers,
        loop={"scheduler": 2.0, "update": 1.0, "guidance": 0.5},
        outside={"text_encoder": None, "vae": 3.0},
    )


@pytest.fixture
def cost() -> CostModel:
    table = TransformerCost(STEP, {site: ATTN if module == "attn1" else FF for site, module in SITES.items()})
    return cost_of({"transformer": table, "high": table, "low": table})


def with_rows(schedule, *rows: str, **changes: Any):
    """Replaces all four rows (and more of the plan); there are no P cells left, so no token rule."""
    plan = schedule.transformers["transformer"]
    plan = replace(plan, rows=dict(zip(plan.rows, rows, strict=True)), **({"k": {}, "forecasts": {}} | changes))
    return replace(schedule, transformers={"transformer": plan}, token_rule=None)


LINEAR = Forecast((3, 0), (1.33333, -0.333333))
REUSED = ["CRRRRR"] * 3
CACHED = 20 + 1 + 2 + 1 + 2  # a step in which the sites reuse, without what a fully cached step saves
BY_HAND = {  # what is charged -> (rows and parameters of a plan, cost of the steps without scheduler and guidance)
    "all compute": (["CCCCCC"] * 4, {}, 6 * FULL),
    "fully cached steps have a cost of their own": (["CRRCRR"] * 4, {}, 2 * FULL + 4 * 12),
    "one computed site pays the fixed part": (["CRRRRR", "CRRRRR", "CRRRRC", "CRRRRR"], {}, FULL + 4 * 12 + CACHED + 59),
    "each prune has its own k": (
        ["CPPPRR", *REUSED], {"k": {ATTN0: (2, 10, 16)}}, FULL + 3 * (CACHED - 1) + 20 + 40 + 60 + 2 * 12,
    ),
    "forecasts cost by their sources": (
        ["CCCCFF", *["CCCCRR"] * 3], {"forecasts": {ATTN0: (LINEAR, Forecast((0,), (1.0,)))}}, 4 * FULL + 2 * CACHED + 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_costs_by_hand(schedule, cost, case):
    rows, parameters, expected = BY_HAND[case]
    found = with_rows(schedule, *rows, **parameters)
    assert cost.schedule(found) == expected + 6 * 2.5
    assert cost.speedup(found) == pytest.approx(2055 / (expected + 15))


def test_every_action_by_hand(schedule, cost):
    """rows CRPCFR, CRRCFP, CRPCFR, CPRCFR; k = 4, 0, 8, 16; forecasts from two sources."""
    columns = [
        FULL,
        20 + 1 + 2 + 1 + 100,  # P with k = 16 = N costs C
        20 + 25 + 2 + 35 + 2,  # k = 4: 20 + 2/8 of 20; k = 8: 20 + 6/8 of 20
        FULL,
        20 + 3 + 4 + 3 + 4,  # F from K = 2 sources
        CACHED,  # P with k = 0 costs R, and yet the column is not all R
    ]
    assert cost.schedule(schedule) == sum(columns) + 6 * 2.5 == 963
    assert cost.all_compute(schedule) == 2055
    assert cost.speedup(schedule) == pytest.approx(2055 / 963)


def test_attention_weights_are_charged_if_a_later_prune_reads_them(schedule, cost):
    """Of ff's cells, the P of step 2 reads the attention of step 0 and the P of step 4 that of step 3; k = N reads none."""
    rows = ["CRRCRR", "CRPRPR", "CRRCRR", "CRPRRR"]
    keys = list(SITES)
    drawn = with_rows(schedule, *rows, k={keys[1]: (4, 4), keys[3]: (16,)})
    table = replace(cost.transformers["transformer"], sites={s: replace(c, map=7.0) for s, c in
                    cost.transformers["transformer"].sites.items()})  # fmt: skip
    mapped = replace(cost, transformers={"transformer": table})
    for base, maps in (("feature_mean", 0), ("value_norm", 0), ("attention_received", 2)):
        ruled = replace(drawn, token_rule=TokenRule(base))
        assert mapped.schedule(ruled) - cost.schedule(ruled) == pytest.approx(7.0 * maps)


def test_prune_is_linear_between_its_points():
    assert [float(ATTN.prune(k)) for k in (0, 1, 2, 4, 10, 13, 16, 20)] == [1, 20, 20, 25, 40, 50, 60, 60]
    assert ATTN.prune(np.array([[0, 4], [10, 13]])).tolist() == [[1, 25], [40, 50]]


def test_skipped_and_uncalled_steps(skipping, cost):
    """stack ..S.-. with one C under the S; the fitted update takes the scheduler's place in every step."""
    columns = [FULL, 12, 8 + 60, FULL, 0, 20 + 1 + 2 + 60 + 2]
    assert cost.schedule(skipping) == sum(columns) + 6 * 1.5 == 854
    assert cost.all_compute(skipping) == 2055  # with the scheduler's own step
    assert cost.speedup(skipping) == pytest.approx(2055 / 854)


def test_a_transformer_costs_nothing_while_another_is_called(relay, cost):
    assert cost.schedule(relay) == 2 * (FULL + 2 * 12) + 6 * 2.5
    assert cost.all_compute(relay) == 2055


def test_missing_sites_are_reported(schedule, cost):
    table = cost.transformers["transformer"]
    fewer = replace(table, sites={site: c for site, c in table.sites.items() if not site.endswith("ff")})
    with pytest.raises(MismatchError, match=r"transformer/transformer_blocks\.0\.ff \(2 sites missing\)"):
        replace(cost, transformers={"transformer": fewer}).schedule(schedule)
    with pytest.raises(MismatchError, match="4 sites missing"):
        replace(cost, transformers={}).schedule(schedule)


@settings(max_examples=80)
@given(st.data())
def test_another_type_an_unknown_key_and_a_missing_key_are_refused(tmp_path_factory, data):
    table = TransformerCost(STEP, {site: ATTN if module == "attn1" else FF for site, module in SITES.items()})
    path = tmp_path_factory.getbasetemp() / "cost.json"
    path.write_text(json.dumps(data.draw(broken(cost_of({"transformer": table}).to_json()))))
    with pytest.raises(FormatError, match=r"cost\.json"):
        load_cost(path)


SITE = ("transformers", "transformer", "sites", "transformer_blocks.0.ff")
STEP0 = ("transformers", "transformer", "step")


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ((*SITE, "C"), -1.0, "Expected `float` >= 0"),
        ((*SITE, "R"), -1, "Expected `int` >= 0"),
        ((*SITE, "F"), [1.0, 2.0, 3.0], "Expected `array` of length 4|length >= 4"),
        ((*SITE, "F"), [1.0] * 5, "length"),
        ((*SITE, "P"), [], "length >= 1"),
        ((*SITE, "P"), [[16, 100.0], [1, 10.0]], "rising order of k"),
        ((*SITE, "P"), [[1, -10.0], [16, 100.0]], ">= 0"),
        ((*SITE, "P"), [[1, 10.0, 3.0], [16, 100.0, 4.0]], "length 2"),
        ((*SITE, "P"), [[1.5, 10.0], [16, 100.0]], "Expected `int`, got `float`"),
        ((*STEP0, "stack"), [7.0, 8.0, 9.0], "length"),
        (("loop", "colour"), 1.0, "Invalid enum value 'colour'"),
        (("outside", "vae"), -1.0, ">= 0"),
        (("unit",), "seconds", "Invalid enum value 'seconds'"),
    ],
)
def test_the_message_says_what_was_found(cost, tmp_path, path, value, found):
    data = json.loads(json.dumps(cost.to_json()))
    at(data, path[:-1])[path[-1]] = value
    (tmp_path / "cost.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match=found):
        load_cost(tmp_path / "cost.json")
