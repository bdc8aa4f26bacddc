"""What all policies share: costs, the budget search, knobs, the registry."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sodaprof.compiler import compile_schedule
from sodaprof.compiler.knobs import knob, read_knobs, values_of
from sodaprof.compiler.policies import POLICIES
from sodaprof.compiler.problem import Problem, bisect, draw_schedule, draw_steps
from sodaprof.errors import BudgetError
from sodaprof.formats.schedule import Forecast
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.formats.tables import TABLES
from tests.conftest import build_cost, build_model, build_sampler
from tests.studies.policies_page import knobs_table, policies_table

STEPS = 10


# ---- costs and the budget search --------------------------------------------------------------------------------------


@st.composite
def whole_step_schedules(draw):
    """A problem, a schedule whose steps do the same at every site, and these steps counted by their action."""
    action = draw(st.sampled_from("RFS-"))
    others = draw(st.sets(st.integers(1, STEPS - 1), max_size=STEPS - 1))
    anchors = sorted(set(range(STEPS)) - others)
    model, sampler = build_model(), build_sampler(STEPS)
    problem = Problem(model, sampler, build_cost(model), draw(st.floats(1, 5)))
    sources = {t: tuple(a for a in reversed(anchors) if a < t)[: draw(st.integers(1, 4))] for t in sorted(others)}
    cells = {t: Forecast(s, (1.0, *[0.0] * (len(s) - 1)), "output") for t, s in sources.items()}
    columns = {t: [cell] * len(model.transformers["t"].sites) for t, cell in cells.items() if action != "-"}
    schedule = draw_schedule(model, sampler, anchors, {})
    if action != "R":
        schedule = draw_steps(model, sampler, {"t": anchors}, action, {"t": columns})
    others = [(action, len(s) if action in "FS" else 0) for s in sources.values()]
    steps = {("C", 0): len(anchors)} | {column: others.count(column) for column in others}
    return problem, schedule, {"t": steps}


@given(whole_step_schedules())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_whole_steps_cost_what_the_schedule_of_them_costs(drawn):
    problem, schedule, steps = drawn
    assert problem.cost_of(steps) == problem.cost_of(schedule) == problem.cost.schedule(schedule)
    assert problem.speedup(steps) == problem.cost.speedup(schedule)
    assert problem.meets(steps) == (problem.cost.speedup(schedule) >= problem.budget * (1 - 1e-9))


@given(st.floats(0.1, 1000), st.floats(0, 1))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_the_bisection_finds_the_smallest_value_that_meets(high, share):
    smallest = share * high
    found = bisect(lambda value: value >= smallest, 0.0, high, absolute=1e-6)
    assert smallest <= found <= smallest + 1e-6


def test_the_smallest_threshold(make_model, make_cost, make_sampler):
    model = make_model()
    problem = Problem(model, make_sampler(STEPS), make_cost(model), 2.0)

    def full_below(least):
        return lambda value: {"t": {("C", 0): STEPS if value < least else 1}}

    assert problem.threshold(0, full_below(0.1234567)) == pytest.approx(0.1234567, rel=2e-6)
    assert problem.threshold(0, full_below(0.0)) == 0.0
    assert problem.threshold(0.2, full_below(0.1)) == 0.2
    with pytest.raises(BudgetError, match=r"threshold=0.05 gives 1x, the budget is 2x. Leave out --knob threshold"):
        problem.threshold(0.05, full_below(0.1))


# ---- knobs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knobs:
    count: int = knob(3, "how many", least=1, most=5)
    share: float = knob(0.5, "how much", least=0)
    kind: str = knob("a", "which", one_of=("a", "b"))
    scale: float = knob(1.0, "of what")
    period: int = knob(None, "how long", kind=int, least=1)


def test_knobs_are_texts_or_values():
    assert read_knobs("p", Knobs, {}) == Knobs(3, 0.5, "a", 1.0, None)
    texts = {"count": "5", "share": "0", "kind": "b", "scale": "-2e3", "period": "4"}
    assert read_knobs("p", Knobs, texts) == read_knobs("p", Knobs, Knobs(5, 0.0, "b", -2000.0, 4).__dict__)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("colour", 1, "Policy p has no knob 'colour'; it has count, share, kind, scale, period."),
        ("count", "many", "Knob count is 'many'; expected int."),
        ("count", None, "Knob count is None; expected int."),
        ("count", 2.5, "Knob count is 2.5; expected int."),
        ("count", math.inf, "Knob count is inf; expected int."),
        ("count", 0, "Knob count is 0; expected 1 to 5."),
        ("count", 6, "Knob count is 6; expected 1 to 5."),
        ("share", "-0.1", "Knob share is -0.1; expected at least 0."),
        ("share", "nan", "Knob share is 'nan'; expected float."),
        ("scale", [], "Knob scale is []; expected float."),
        ("scale", math.inf, "Knob scale is inf; expected float."),
        ("kind", "loud", "Knob kind is 'loud'; expected one of a, b."),
        ("kind", "", "Knob kind is ''; expected one of a, b."),
        ("period", 0, "Knob period is 0; expected at least 1."),
    ],
)
def test_wrong_knobs_are_one_error(name, value, message):
    with pytest.raises(BudgetError) as caught:
        read_knobs("p", Knobs, {name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("policy", "knobs", "found"),
    [
        ("soda", {"colour": 1}, "'colour'; it has anchors, uas, segment, metric, scale"),
        ("soda", {"uas": "loud"}, "'loud'; expected one of priced, paper, none"),
        ("soda", {"segment": "mean"}, "'mean'; expected one of sum, endpoint"),
        ("soda", {"metric": "l3"}, "'l3'; expected one of cos, l1, l2"),
        ("soda", {"anchors": 2}, "3 to 5 full steps meet a budget of 2x. Full steps are at most 5 apart, the longest"),
        ("soda", {"anchors": 6}, "Knob anchors is 6; 3 to 5 full steps meet a budget of 2x."),
        ("fora", {"anchors": -1}, "Knob anchors is -1; expected at least 0"),
        ("fora", {"anchors": 13}, "Knob anchors is 13; 1 to 5 full steps meet a budget of 2x."),
        ("forecast", {"K": 5}, "Knob K is 5; expected one of 1, 2, 3, 4"),
        ("forecast", {"ridge": 0}, "Knob ridge is 0; expected a number above 0"),
        ("forecast", {"metric": "cos"}, "Knob metric is 'cos'; expected one of l2, absolute"),
        ("forecast", {"power": -1}, "Knob power is -1"),
        ("forecast", {"anchors": 9}, "Knob anchors is 9; 3 to 5 full steps meet a budget of 2x."),
        ("drift", {"form": "velocity"}, "expected one of drift, output"),
        ("taylor", {"order": 3}, "Knob order is 3; expected one of 1, 2"),
        ("taylor", {"placement": "random"}, "expected one of even, dp"),
        ("taylor", {"formula": "hermite"}, "expected one of published, lagrange"),
        ("taylor", {"N": 0.5}, "Knob N is 0.5; expected at least 1"),
        ("taylor", {"N": 3, "placement": "dp"}, "read by placement=even alone"),
        ("taylor", {"N": 2}, "the budget is 2x. Leave out --knob N to have it chosen"),
    ],
    ids=str,
)
def test_wrong_knobs_of_policies(random_profile, values, policy, knobs, found):
    with pytest.raises(BudgetError) as caught:
        compile_schedule(random_profile, 2.0, policy, knobs=knobs)
    assert found in str(caught.value)


# ---- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if not policy.released])
def test_an_inspection_is_enough_for_policies_that_read_no_tables(make_profile, random_errors, name):
    folder = make_profile(random_errors)
    for file in ("manifest.json", *(f"{table}.parquet" for table in TABLES)):
        (folder / file).unlink()
    if not POLICIES[name].reads.startswith("none"):
        with pytest.raises(BudgetError, match=rf"{name} needs a profile .* Measure them: sodaprof profile MODEL"):
            compile_schedule(folder, 2.0, name)
        return
    schedule = compile_schedule(folder, 2.0, name)
    assert schedule.profile is None
    assert schedule.predicted["speedup"] >= 2
    if name == "taylor":
        with pytest.raises(BudgetError, match="taylor with placement=dp needs a profile"):
            compile_schedule(folder, 2, name, knobs={"placement": "dp"})


@pytest.mark.parametrize("name", POLICIES)
def test_defaults_are_values_that_a_knob_takes(name):
    knobs = POLICIES[name].knobs
    defaults = {one.name: one.default for one in fields(knobs) if one.default is not None}
    assert read_knobs(name, knobs, defaults) == knobs()
    assert POLICIES[name].released == (len(defaults) < len(values_of(knobs)))
    assert sum(values.depth for values in values_of(knobs).values()) <= 1


@pytest.mark.parametrize("name", ["soda", "fora", "taylor", "smoothcache"])
def test_schedules_name_their_policy_and_all_of_its_knobs(random_profile, name):
    policy = compile_schedule(random_profile, 1.5, name).policy
    assert policy["name"] == name
    assert set(policy["knobs"]) == set(values_of(POLICIES[name].knobs))


def test_the_tables_of_the_documentation_name_every_policy_and_knob():
    for name, policy in POLICIES.items():
        assert f"| `{name}` | {policy.help} |" in policies_table()
        assert all(f"| `{knob}` |" in knobs_table(name) for knob in values_of(policy.knobs))


def test_the_former_name_of_forecast_is_accepted_with_a_note(random_profile, schedule, tmp_path, caplog):
    with pytest.raises(Exception, match=r"Profile again|--no-gram"):  # as for `forecast`: this profile has no products
        compile_schedule(random_profile, 2.0, "fit")
    assert "Policy fit is called forecast now." in caplog.text
    replace(schedule, policy={"name": "fit", "knobs": {"K": 2}}).save(tmp_path / "old.json")
    assert load_schedule(tmp_path / "old.json").policy["name"] == "fit"
