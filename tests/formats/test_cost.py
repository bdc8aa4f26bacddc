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
from sodaprof.formats.cost import CostModel, SiteCost, StepCost, TransformerCost, load_cost, save_cost
from sodaprof.formats.schedule import TokenRule
from tests.strategies import at, broken

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


def test_all_compute(schedule, cost):
    full = with_rows(schedule, *["CCCCCC"] * 4)
    assert cost.schedule(full) == 6 * (FULL + 2.5) == 2055
    assert cost.speedup(full) == 1.0


def test_fully_cached_steps_have_a_cost_of_their_own(schedule, cost):
    reuse = with_rows(schedule, *["CRRCRR"] * 4)
    assert cost.schedule(reuse) == 2 * FULL + 4 * 12 + 6 * 2.5 == 743
    assert cost.speedup(reuse) == pytest.approx(2055 / 743)


def test_one_computed_site_pays_the_fixed_part(schedule, cost):
    mixed = with_rows(schedule, "CRRRRR", "CRRRRR", "CRRRRC", "CRRRRR")
    assert cost.schedule(mixed) == FULL + 4 * 12 + (20 + 1 + 2 + 60 + 2) + 6 * 2.5


def test_every_action_by_hand(schedule, cost):
    """rows CRPCFR, CRRCFP, CRPCFR, CPRCFR; k = 4, 0, 8, 16; forecasts from two sources."""
    columns = [
        FULL,
        20 + 1 + 2 + 1 + 100,  # P with k = 16 = N costs C
        20 + 25 + 2 + 35 + 2,  # k = 4: 20 + 2/8 of 20; k = 8: 20 + 6/8 of 20
        FULL,
        20 + 3 + 4 + 3 + 4,  # F from K = 2 sources
        20 + 1 + 2 + 1 + 2,  # P with k = 0 costs R, and yet the column is not all R
    ]
    assert cost.schedule(schedule) == sum(columns) + 6 * 2.5 == 963
    assert cost.all_compute(schedule) == 2055
    assert cost.speedup(schedule) == pytest.approx(2055 / 963)


def test_each_prune_has_its_own_k(schedule, cost):
    rows = ["CPPPRR", *["CRRRRR"] * 3]
    pruned = with_rows(schedule, *rows, k={next(iter(SITES)): (2, 10, 16)})
    assert cost.schedule(pruned) == FULL + 3 * (20 + 2 + 1 + 2) + 20 + 40 + 60 + 2 * 12 + 6 * 2.5


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


def test_forecasts_cost_by_their_sources(schedule, cost):
    site = next(iter(SITES))
    forecast = schedule.transformers["transformer"].forecasts[site][0]
    one = replace(forecast, sources=(0,), weights=(1.0,))
    rows = ["CCCCFF", *["CCCCRR"] * 3]
    given = with_rows(schedule, *rows, forecasts={site: (forecast, one)})
    assert cost.schedule(given) == 4 * FULL + (20 + 3 + 5) + (20 + 2 + 5) + 6 * 2.5


def test_skipped_and_uncalled_steps(skipping, cost):
    """stack ..S.-. with one C under the S; the fitted update takes the scheduler's place in every step."""
    columns = [FULL, 12, 8 + 60, FULL, 0, 20 + 1 + 2 + 60 + 2]
    assert cost.schedule(skipping) == sum(columns) + 6 * 1.5 == 854
    assert cost.all_compute(skipping) == 2055  # with the scheduler's own step
    assert cost.speedup(skipping) == pytest.approx(2055 / 854)


def test_a_transformer_costs_nothing_while_another_is_called(relay, cost):
    assert cost.schedule(relay) == 2 * (FULL + 2 * 12) + 6 * 2.5
    assert cost.all_compute(relay) == 2055


def test_outside_is_not_part_of_the_loop(schedule, cost):
    expensive = replace(cost, outside={"text_encoder": 1e9, "vae": 1e9})
    assert expensive.schedule(schedule) == cost.schedule(schedule)


def test_missing_sites_are_reported(schedule, cost):
    table = cost.transformers["transformer"]
    fewer = replace(table, sites={site: c for site, c in table.sites.items() if not site.endswith("ff")})
    with pytest.raises(MismatchError, match=r"transformer/transformer_blocks\.0\.ff \(2 sites missing\)"):
        replace(cost, transformers={"transformer": fewer}).schedule(schedule)
    with pytest.raises(MismatchError, match="4 sites missing"):
        replace(cost, transformers={}).schedule(schedule)


def test_round_trip(cost, tmp_path):
    save_cost(cost, tmp_path / "cost.json")
    assert load_cost(tmp_path / "cost.json") == cost
    with pytest.raises(FormatError, match="exists already"):
        save_cost(cost, tmp_path / "cost.json")


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
        ((*SITE, "C"), 10**400, "is not a finite number"),
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
        (("version",), 2, "Upgrade sodaprof"),
        (("format",), "sodaprof.schedule", "found format 'sodaprof.schedule'"),
        (("colour",), 1, "unknown field `colour`"),
    ],
)
def test_the_message_says_what_was_found(cost, tmp_path, path, value, found):
    data = json.loads(json.dumps(cost.to_json()))
    at(data, path[:-1])[path[-1]] = value
    (tmp_path / "cost.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match=found):
        load_cost(tmp_path / "cost.json")
