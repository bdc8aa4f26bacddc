"""Published policies without a placement of their own: TaylorSeer at even intervals, MagCache, SmoothCache."""

from __future__ import annotations

import numpy as np
import pytest

from sodaprof.compiler import compile_schedule
from sodaprof.compiler.policies.magcache import full_steps
from sodaprof.compiler.policies.smoothcache import row_of
from sodaprof.errors import BudgetError
from sodaprof.formats.cost import load_cost

STEPS = 12  # of `random_profile`


def speedup(folder, schedule) -> float:
    return load_cost(folder / "cost.flops.json").speedup(schedule)


# ---- TaylorSeer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "knobs", "anchors"),
    [
        (1, {"N": 3}, [0, 1, 4, 7, 10]),
        (2, {"N": 3}, [0, 1, 2, 5, 8, 11]),
        (1, {"N": 5, "first": 1}, [0, 5, 10]),
        (1, {"N": 2.5, "first": 4}, [0, 1, 2, 3, 5, 8, 11]),
    ],
)
def test_taylor_computes_the_first_steps_and_then_every_nth(random_profile, order, knobs, anchors):
    schedule = compile_schedule(random_profile, 1.0, "taylor", knobs=knobs | {"order": order})
    plan = schedule.transformers["t"]
    assert plan.anchors() == anchors
    assert set(plan.rows.values()) == {"".join("C" if t in anchors else "F" for t in range(STEPS))}
    assert schedule.predicted["error"] is None


def test_taylor_extrapolates_from_the_last_full_steps(random_profile):
    schedule = compile_schedule(random_profile, 1.0, "taylor", knobs={"order": 2, "N": 4, "first": 1})
    cells = next(iter(schedule.transformers["t"].forecasts.values()))  # anchors 0, 4, 8
    steps = [1, 2, 3, 5, 6, 7, 9, 10, 11]
    by_step = dict(zip(steps, cells, strict=True))
    assert (by_step[3].sources, by_step[3].weights) == ((0,), (1.0,))
    assert (by_step[5].sources, by_step[5].weights) == ((4, 0), (1.25, -0.25))
    # x = 2, d = 4: 1 + x/d + x²/2d² = 1.625, −x/d − x²/d² = −0.75, x²/2d² = 0.125
    assert (by_step[10].sources, by_step[10].weights) == ((8, 4, 0), (1.625, -0.75, 0.125))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 2.5])
def test_taylor_takes_the_smallest_interval_that_meets_the_budget(random_profile, budget, order):
    schedule = compile_schedule(random_profile, budget, "taylor", knobs={"order": order})
    knobs = schedule.policy["knobs"]
    assert speedup(random_profile, schedule) >= budget
    again = compile_schedule(random_profile, budget, "taylor", knobs=knobs)
    assert again == schedule
    if knobs["N"] > 1.001:
        with pytest.raises(BudgetError, match="Leave out --knob N"):
            compile_schedule(random_profile, budget, "taylor", knobs=knobs | {"N": knobs["N"] - 0.002})


# ---- MagCache ---------------------------------------------------------------------------------------------------------


def test_magcache_accumulates_the_change_of_size_since_the_last_computed_step():
    """From size 1: |1 − 0.9| + |1 − 0.8| reaches 0.3 at step 2; from there |1 − 0.7/0.8| stays below."""
    sizes = np.array([1.0, 0.9, 0.8, 0.7, 0.7, 0.7])
    assert full_steps(sizes, 0.29, 9, 0.0) == [0, 2, 5]  # 1/8 + 1/8, and the third reaches it
    assert full_steps(sizes, 0.31, 9, 0.0) == [0, 3]
    assert full_steps(sizes, 0.05, 9, 0.0) == [0, 1, 2, 3]
    assert full_steps(sizes, 0.0, 9, 0.0) == [0, 1, 2, 3, 4, 5]
    assert full_steps(sizes, 9.0, 2, 0.0) == [0, 3]
    assert full_steps(sizes, 9.0, 9, 0.5) == [0, 1, 2]


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 2.6])
def test_magcache_reuses_the_newest_drift(random_profile, values, budget):
    schedule = compile_schedule(random_profile, budget, "magcache")
    plan, knobs = schedule.transformers["t"], schedule.policy["knobs"]
    sizes = np.sqrt((values[:, 1] ** 2).sum(-1).mean(0))
    anchors = full_steps(sizes, knobs["threshold"], knobs["skips"], knobs["retain"])
    assert plan.anchors() == anchors
    assert speedup(random_profile, schedule) >= budget
    for step, cell in zip([t for t in range(STEPS) if t not in anchors], plan.stack_forecasts, strict=True):
        assert (cell.sources, cell.weights, cell.form) == ((max(a for a in anchors if a < step),), (1.0,), "drift")
    if budget > 1:
        with pytest.raises(BudgetError, match="Leave out --knob threshold"):
            compile_schedule(random_profile, budget, "magcache", knobs=knobs | {"threshold": knobs["threshold"] * 0.99})


def test_magcache_keeps_its_released_settings_where_the_budget_allows(random_profile, values):
    modest = compile_schedule(random_profile, 1.5, "magcache").policy["knobs"]
    assert (modest["skips"], modest["retain"]) == (4, 0.2)
    tight = compile_schedule(random_profile, 5.0, "magcache").policy["knobs"]
    assert (tight["skips"], tight["retain"]) == (10, 0.1)
    with pytest.raises(BudgetError, match=r"cannot be met with skips=1 and retain=0.2: at most 1\.\d+x \(flops\)"):
        compile_schedule(random_profile, 2.0, "magcache", knobs={"skips": 1})


# ---- SmoothCache ------------------------------------------------------------------------------------------------------


def test_smoothcache_reuses_until_the_error_reaches_the_threshold():
    """error[t, age]: growing by 0.1 a step of age, twice that from step 4 on."""
    error = np.where(np.arange(8)[:, None] < 4, 0.1, 0.2) * np.arange(5)
    assert row_of(error, list(range(8)), 0.25) == "CRRCRCRC"
    assert row_of(error, list(range(8)), 0.0) == "CCCCCCCC"
    assert row_of(error, list(range(8)), 9.0) == "CRRRRCRR"  # ages up to 4 are known
    assert row_of(error, [-1, 0, 1, 2, -1, -1, 0, 1], 9.0) == "_CRR__CR"


def test_smoothcache_decides_a_kind_at_a_time(make_profile, random_errors):
    errors = random_errors.copy()
    errors[:, 1::2] *= 3  # feed-forwards change faster
    errors[:, 0] *= 0.5  # layers of a kind count by their mean
    folder = make_profile(errors)
    for budget in (1.0, 1.5, 2.0, 2.5):
        schedule = compile_schedule(folder, budget, "smoothcache")
        threshold = schedule.policy["knobs"]["threshold"]
        rows = schedule.transformers["t"].rows
        for module, columns in (("attn1", [0, 2]), ("ff", [1, 3])):
            mean = errors[:, columns].mean(axis=1).astype(np.float32).astype(float)
            expected = row_of(mean, list(range(STEPS)), threshold)
            assert [row for site, row in rows.items() if site.endswith(module)] == [expected] * 2
        assert speedup(folder, schedule) >= budget
        if budget > 1:
            assert rows["blocks.0.attn1"].count("C") < rows["blocks.0.ff"].count("C")
            with pytest.raises(BudgetError, match="Leave out --knob threshold"):
                compile_schedule(folder, budget, "smoothcache", knobs={"threshold": threshold * 0.99})


def test_smoothcache_reads_the_relative_l1_error(make_profile, random_errors):
    errors = {"cos": random_errors[:, ::-1] ** 2, "l1": random_errors, "l2": random_errors[::-1]}
    mixed = compile_schedule(make_profile(errors, name="mixed"), 2.0, "smoothcache")
    alone = compile_schedule(make_profile(random_errors, name="alone"), 2.0, "smoothcache")
    assert mixed.transformers == alone.transformers
