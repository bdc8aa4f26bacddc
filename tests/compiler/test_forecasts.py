"""Forecasts: weights and errors from inner products, full steps for them, the policies forecast and drift, their caches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sodaprof.compiler import compile_schedule
from sodaprof.compiler.forecasts import (
    forecast_error,
    forecasts_at,
    ridge,
    round_weights,
    segment_costs,
    sources_of,
    taylor,
)
from sodaprof.compiler.problem import cache_bytes
from sodaprof.errors import BudgetError, FormatError, UnsupportedModelError
from sodaprof.formats.cost import load_cost
from sodaprof.formats.rules import verify
from sodaprof.formats.schedule import Schedule, Update
from sodaprof.runtime.hooks.cells import dropped_at, last_uses
from tests.compiler.trajectories import (
    error_in,
    error_of,
    known_products,
    polynomial,
    products,
    segment_error,
    wandering,
)

STEPS, SITES, LONGEST = 12, 4, 5  # of `random_profile`
EXACT = ridge(1e-12)


# ---- weights and errors -----------------------------------------------------------------------------------------------


def test_weights_have_six_significant_digits():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=2000) * 10.0 ** rng.uniform(-9, 4, 2000)
    weights[:4] = 0.0, 1.0, -1 / 3, 0.9999999
    rounded = round_weights(weights)
    assert rounded.tolist() == [float(f"{w:.6g}") for w in weights]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fitted_weights_are_those_of_least_squares_with_a_pull_towards_reuse(count):
    values, strength = wandering(2, 10), 1e-2
    sources = np.array([6, 5, 3, 0])[:count]
    weights = ridge(strength)(products(values), sources, np.array([8]))
    for site in range(2):
        known = values[:, site, sources].transpose(0, 2, 1).reshape(-1, count)  # [G · D, K]
        energy = (known**2).sum(0).mean() / len(values)
        pull = np.sqrt(strength * energy * len(values))
        stacked = np.concatenate([known, pull * np.eye(count)])
        wanted = np.concatenate([values[:, site, 8].ravel(), pull * np.eye(count)[0]])
        expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
        assert weights[site, :, 0] == pytest.approx(expected, abs=1e-5)


def test_an_output_that_is_all_zeros_is_reused_without_error():
    table, sources, targets = products(np.zeros((1, 1, 6, 4))), np.array([3, 1]), np.array([4, 5])
    weights = ridge(1e-4)(table, sources, targets)
    assert weights[0].tolist() == [[1, 1], [0, 0]]
    assert forecast_error(table, sources, targets, weights).tolist() == [[0, 0]]


def test_two_sources_are_exact_on_what_is_linear_in_time():
    """From steps 7 and 4, two steps ahead: Y + 2/3 of the last difference."""
    table = products(polynomial(1, 3, 12))
    for weigh in (EXACT, taylor("published"), taylor("lagrange")):
        weights = np.broadcast_to(weigh(table, np.array([7, 4]), np.array([8, 9])), (3, 2, 2))
        assert weights[0, :, 1] == pytest.approx([1 + 2 / 3, -2 / 3], abs=1e-5)
        assert weights[0, :, 0] == pytest.approx([1 + 1 / 3, -1 / 3], abs=1e-5)
        assert forecast_error(table, np.array([7, 4]), np.array([8, 9]), weights).max() < 1e-5


def test_three_sources_are_exact_on_what_is_quadratic_in_time():
    """From steps 7, 5 and 2, three steps ahead: the parabola through them."""
    table, sources, targets = products(polynomial(2, 3, 12)), np.array([7, 5, 2]), np.array([10])
    expected = [(10 - 5) * (10 - 2) / ((7 - 5) * (7 - 2)), (10 - 7) * (10 - 2) / ((5 - 7) * (5 - 2))]
    expected.append((10 - 7) * (10 - 5) / ((2 - 7) * (2 - 5)))
    assert expected[0] > 1 > 0 > expected[1]
    for weigh, tolerance in ((EXACT, 1e-3), (taylor("lagrange"), 1e-5)):
        weights = np.broadcast_to(weigh(table, sources, targets), (3, 3, 1))
        assert weights[0, :, 0] == pytest.approx(expected, abs=tolerance)
        assert forecast_error(table, sources, targets, weights).max() < 1e-4
    two = EXACT(table, sources[:2], targets)
    assert forecast_error(table, sources[:2], targets, two).min() > 1e-2


def test_differences_are_over_the_distance_of_the_anchors():
    """Of steps 9, 8 and 4: Δ¹ = Y9 − Y8, Δ² = (Δ¹ − (Y8 − Y4) / 4) / 1, published; two steps ahead Y + 2 Δ¹ + 2 Δ²."""
    weights = taylor("published")(np.zeros((1, 0, 0)), np.array([9, 8, 4]), np.array([11]))[0, :, 0]
    assert weights.tolist() == [1 + 2 + 2, -2 - 2 - 0.5, 0.5]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_errors_equal_those_of_the_vectors(count):
    values = wandering(3, 10)
    sources, targets = np.array([6, 4, 3, 0])[:count], np.array([7, 9])
    weights = ridge(1e-4)(products(values), sources, targets)
    relative = forecast_error(products(values), sources, targets, weights)
    absolute = forecast_error(products(values), sources, targets, weights, "absolute")
    for site in range(3):
        for i, target in enumerate(targets):
            expected = error_of(values[:, site], int(target), tuple(sources), tuple(weights[site, :, i]))
            assert relative[site, i] == pytest.approx(expected, rel=1e-6)
            size = np.sqrt((values[:, site, target] ** 2).sum(-1).mean())
            assert absolute[site, i] == pytest.approx(expected * size, rel=1e-6)


# ---- full steps ----------------------------------------------------------------------------------------------------------


def placements(count: int, first: int) -> Iterator[list[int]]:
    """Yields all placements of `count` full steps whose intervals the profile measured, the first `first` steps full."""
    for others in combinations(range(first, STEPS), max(count - first, 0)):
        anchors = [*range(first), *others]
        if np.diff([*anchors, STEPS]).max() <= LONGEST:
            yield anchors


class Prices:
    """Σ error^power over all cells between anchors, each from the vectors."""

    def __init__(self, values: np.ndarray, history: int, weigh: Callable, band: int, power: float = 1.0) -> None:
        self.values, self.history, self.weigh, self.power = values, history, weigh, power
        self.table = products(values, band)
        self.known = ~np.isnan(self.table[0])
        self.cells: dict[tuple[int, tuple[int, ...]], float] = {}

    def sources(self, anchors: list[int]) -> dict[int, tuple[int, ...]]:
        return sources_of(anchors, [range(self.values.shape[2])], self.history, self.known)

    def __call__(self, anchors: list[int]) -> float:
        return sum(self.cell(step, sources) for step, sources in self.sources(anchors).items())

    def cell(self, step: int, sources: tuple[int, ...]) -> float:
        if (step, sources) not in self.cells:
            column = forecasts_at(self.table, {step: sources}, self.weigh)[step]
            errors = [error_of(self.values[:, i], step, c.sources, c.weights) for i, c in enumerate(column)]
            self.cells[step, sources] = sum(error**self.power for error in errors)
        return self.cells[step, sources]


@given(
    st.integers(1, 4),
    st.sampled_from([4, 9]),
    st.sampled_from([1.0, 2.5]),
    st.sets(st.integers(1, 9)),
    st.integers(0, 3),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_segments_are_the_errors_of_the_vectors(history, band, power, others, seed):
    """Of any full steps; with a band, old sources drop out of the far forecasts. What is not known is refused."""
    anchors, longest, values = [0, *sorted(others)], 6, wandering(2, 10, seed)
    segment = segment_costs(products(values, band), history, longest, ridge(1e-3), power)
    found = segment_error(segment, anchors)
    if np.diff([*anchors, 10]).max() <= min(longest, band + 1):
        assert found == pytest.approx(Prices(values, history, ridge(1e-3), band, power)(anchors), rel=1e-6)
    else:
        assert found == math.inf


def test_sites_that_are_weighed_in_pieces_count_as_in_one(monkeypatch):
    table, asked = products(wandering(5, 12), 9), []

    def weigh(some, sources, targets):
        asked.append(len(some))
        return ridge(1e-3)(some, sources, targets)

    whole = segment_costs(table, 3, 5, weigh)
    assert set(asked) == {5}
    asked.clear()
    monkeypatch.setattr("sodaprof.compiler.forecasts.AT_ONCE", 40)
    assert segment_costs(table, 3, 5, weigh) == pytest.approx(whole, rel=1e-12)
    assert {1, 2} < set(asked)


# ---- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "knobs", "history", "weigh", "first"),
    [
        *[("forecast", {"K": k}, k, ridge(1e-4), 1) for k in (1, 2, 3, 4)],
        *[("drift", {"K": 2, "form": form}, 2, ridge(1e-4), 1) for form in ("drift", "output")],
        ("forecast", {"first": 3}, 2, ridge(1e-4), 3),
        ("drift", {"first": 3, "K": 1, "form": "drift"}, 1, ridge(1e-4), 3),
        *[("dpcache", {"first": first}, 2, taylor("published"), first) for first in (1, 3)],
        *[
            ("taylor", {"placement": "dp", "order": order, "formula": formula}, order + 1, taylor(formula), order + 1)
            for order in (1, 2)
            for formula in ("published", "lagrange")
        ],
    ],
    ids=lambda value: str(value) if isinstance(value, str | dict) else None,
)
def test_the_budget_is_met_with_the_least_error(random_profile, values, policy, knobs, history, weigh, first):
    """Of all placements; a full step costs 340, a forecast one 20 + 4 · (1 + sources), a skipped one 6 + sources, the loop 2."""
    cost, form = load_cost(random_profile / "cost.flops.json"), knobs.get("form", "output")
    of_sites = policy in ("forecast", "taylor")
    outputs = values if of_sites else values[:, [0 if form == "output" else 1]]
    price = Prices(outputs, history, weigh, STEPS, 2.0 if policy in ("forecast", "drift") else 1.0)

    def cost_of(anchors: list[int]) -> float:
        others = sum(24 + 4 * len(s) if of_sites else 6 + len(s) for s in price.sources(anchors).values())
        return 24 + 340 * len(anchors) + others

    bests = [min(placements(n, first), key=price, default=None) for n in range(first, STEPS + 1)]
    for budget in (1.0, 1.3, 2.0, 2.4):
        schedule = compile_schedule(random_profile, budget, policy, knobs=knobs)
        plan = schedule.transformers["t"]
        anchors = plan.anchors()
        assert cost.speedup(schedule) >= budget * (1 - 1e-9)
        assert schedule.predicted["cost"] == pytest.approx(cost.schedule(schedule)) == cost_of(anchors)
        assert schedule.predicted["error"] == pytest.approx(error_in(schedule, "t", outputs), rel=1e-6)
        best = min(price(a) for a in bests if a and cost_of(a) <= 4104 / budget)
        assert schedule.predicted["error"] == pytest.approx(best, rel=1e-6)
        other = "F" if of_sites else "-"
        assert list(plan.rows.values()) == ["".join("C" if t in anchors else other for t in range(STEPS))] * SITES
        assert plan.stack == "".join("." if of_sites or t in anchors else "S" for t in range(STEPS))
        assert {cell.form for cell in plan.stack_forecasts} <= {form}


@pytest.mark.parametrize("policy", ["forecast", "drift", "dpcache", "smoothcache"])
def test_unreachable_budgets(random_profile, values, policy):
    """Full steps are at most 5 apart, so there are at least 3 of 12."""
    with pytest.raises(
        BudgetError, match=r"A budget of 4x cannot be met: at most 3\.\d+x \(flops\) can.*--max-interval 6"
    ):
        compile_schedule(random_profile, 4.0, policy, knobs={"first": 1} if policy == "dpcache" else {})


def test_products_that_reach_no_other_step(random_profile, monkeypatch):
    known_products(monkeypatch, {"t": products(wandering(SITES, STEPS), 0)}, {})
    with pytest.raises(BudgetError, match="No full steps at most 5 apart have forecasts"):
        compile_schedule(random_profile, 2.0, "forecast")


@pytest.mark.parametrize("policy", ["forecast", "drift", "dpcache", "magcache"])
def test_a_profile_without_inner_products(random_profile, policy):
    with pytest.raises(FormatError, match=r"Profile again|--no-gram"):
        compile_schedule(random_profile, 2.0, policy)


@pytest.mark.parametrize("policy", ["drift", "dpcache", "magcache"])
def test_stacks_that_return_several_tensors(random_profile, monkeypatch, policy):
    known_products(monkeypatch, {}, {})
    with pytest.raises(UnsupportedModelError, match="no products of the stack of t"):
        compile_schedule(random_profile, 2.0, policy)


def test_two_hundred_and_fifty_steps(make_profile, monkeypatch):
    """A band of 12 steps: a source further away is left out of the forecast."""
    errors = np.full((250, 2, 10), 0.1)
    made = wandering(2, 250)
    known_products(monkeypatch, {"t": products(made, 12)}, {"t": {"drift": products(made, 12)[0]}})
    folder = make_profile(errors)
    for policy, knobs in (("forecast", {"K": 2}), ("forecast", {"K": 3}), ("drift", {"K": 3})):
        schedule = compile_schedule(folder, 3.0, policy, knobs=knobs)
        assert schedule.predicted["speedup"] >= 3
        assert schedule.predicted["error"] == pytest.approx(error_in(schedule, "t", made), rel=1e-5)
        assert np.diff([*schedule.anchors(), 250]).max() <= 10


# ---- transformers that take turns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["forecast", "drift", "dpcache", "magcache", "taylor", "smoothcache"])
def test_each_turn_begins_with_a_full_step(make_profile, make_model, random_errors, monkeypatch, policy):
    model = make_model(names=("high", "low"))
    calls = {"high": tuple(range(5)), "low": tuple(range(5, STEPS))}
    model = replace(model, transformers={n: replace(t, called=calls[n]) for n, t in model.transformers.items()})
    folder = make_profile(random_errors, model=model)
    tables = {}
    for i, (name, steps) in enumerate(calls.items()):
        tables[name] = np.full((SITES, STEPS, STEPS), np.nan)
        inside = slice(steps[0], steps[-1] + 1)
        tables[name][:, inside, inside] = products(wandering(SITES, len(steps), seed=i))
    known_products(monkeypatch, tables, {n: {"output": t[0], "drift": t[1]} for n, t in tables.items()})
    for budget in (1.3, 2.0):
        schedule = compile_schedule(folder, budget, policy, knobs={"first": 1} if policy == "dpcache" else {})
        verify(schedule)
        cost = load_cost(folder / "cost.flops.json")
        assert cost.speedup(schedule) >= budget
        assert schedule.predicted["cost"] == pytest.approx(cost.schedule(schedule))
        for name, steps in calls.items():
            plan = schedule.transformers[name]
            assert steps[0] in plan.anchors()
            assert [t for t, action in enumerate(plan.stack) if action != "_"] == list(steps)


# ---- what is kept -----------------------------------------------------------------------------------------------------


def most_kept(schedule: Schedule) -> int:
    """Returns the bytes kept at most, by running the rows as the runtime keeps its stores; every output is 16 x 8 fp32."""
    plan, most = schedule.transformers["t"], 0
    rows = [(row, "F", plan.forecasts.get(site, ())) for site, row in plan.rows.items()]
    for row, action, cells in [*rows, (plan.stack, "S", plan.stack_forecasts)]:
        steps = [t for t, a in enumerate(row) if a == action]
        last = last_uses({t: cell.sources for t, cell in zip(steps, cells, strict=True)})
        drop_at = dropped_at(last)
        kept: set[int] = set()
        largest = 0
        for step in range(len(row)):
            kept |= {step} & set(last)
            largest = max(largest, len(kept))
            kept -= set(drop_at.get(step, ()))
        most += largest + bool(set(row) & set("RP"))
    return most * 16 * 8 * 4 * 2


@pytest.mark.parametrize(
    ("policy", "knobs"),
    [("forecast", {"K": 1}), ("forecast", {"K": 4}), ("drift", {"K": 3}), ("dpcache", {})],
)
def test_cache_bytes_count_the_outputs_that_later_forecasts_need(random_profile, values, policy, knobs):
    schedule = compile_schedule(random_profile, 2.0, policy, knobs=knobs)
    assert schedule.predicted["cache_bytes"] == most_kept(schedule)
    if policy == "forecast":
        assert most_kept(schedule) == SITES * knobs["K"] * 1024


def test_cache_bytes_count_reuse_and_forecasts_of_one_site(schedule, make_model):
    """Rows CRPCFR: one cache, and two sources of one forecast."""
    plan = schedule.transformers["transformer"]
    sites = make_model().transformers["t"].sites
    sites = tuple(replace(s, stack="transformer_blocks") for s in sites)
    model = make_model(names=("transformer",))
    model = replace(model, transformers={"transformer": replace(model.transformers["transformer"], sites=sites)})
    assert cache_bytes(schedule, model) == len(plan.rows) * 3 * 1024
    updated = replace(schedule, update=Update("output", 3, ((1.0, 0, 0, 0),) * 6, {}))
    assert cache_bytes(updated, model) == len(plan.rows) * 3 * 1024 + 3 * 4 * 8 * 8 * 4


def test_a_limit_on_the_caches(random_profile, values):
    three = compile_schedule(random_profile, 2.0, "forecast", knobs={"K": 3}, max_cache=SITES * 3 * 1024)
    assert three.policy["knobs"]["K"] == 3
    free = compile_schedule(random_profile, 2.0, "forecast", max_cache=SITES * 2 * 1024)
    assert free == compile_schedule(random_profile, 2.0, "forecast")
    one = compile_schedule(random_profile, 2.0, "forecast", max_cache=SITES * 2 * 1024 - 1)
    assert one.policy["knobs"]["K"] == 1
    assert one.predicted["cache_bytes"] == SITES * 1024
    with pytest.raises(BudgetError, match=r"take 4,096 bytes, at most 4,095 are allowed \(--max-cache\)"):
        compile_schedule(random_profile, 2.0, "forecast", max_cache=SITES * 1024 - 1)
    with pytest.raises(BudgetError, match="take 8,192 bytes"):
        compile_schedule(random_profile, 2.0, "forecast", knobs={"K": 2}, max_cache=SITES * 2 * 1024 - 1)
    order = compile_schedule(random_profile, 2.0, "taylor", knobs={}, max_cache=SITES * 2 * 1024)
    assert order.policy["knobs"]["order"] == 1
    with pytest.raises(BudgetError, match="--max-cache"):
        compile_schedule(random_profile, 2.0, "soda", max_cache=1)
