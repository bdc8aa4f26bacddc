"""The proxy study's own arithmetic: random and exhaustive schedules, shared beginnings, predictions, regret, its page."""

from __future__ import annotations

import numpy as np
import pytest

import sodaprof
from sodaprof.compiler.fit import Stepper
from sodaprof.compiler.forecasts import ridge, segment_costs
from sodaprof.compiler.placement import place_full_steps
from sodaprof.compiler.problem import draw_schedule, draw_steps
from sodaprof.pipelines.replay import Replay, ReplaySpace
from sodaprof.tuning.closed_loop import attached, fidelity_db, fit_update, sampled_distances
from tests.studies import proxy_study, proxy_truth
from tests.studies.proxy_page import BEGIN, END, fill, tables
from tests.studies.proxy_study import (
    SOLVER,
    Predictor,
    agreement,
    compared,
    growing,
    oracle,
    placements,
    predictors,
    regret,
    simulations,
    study,
    summed,
)
from tests.studies.proxy_truth import (
    Truths,
    anchors_of,
    columns_at,
    every_column,
    longest_interval,
    random_columns,
    walk,
)
from tests.tiny_pipelines import tiny_pipe

STEPS, FULL, LONGEST = 10, 4, 6


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def profile(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxies") / "profile"
    return sodaprof.profile(pipe, folder, name="tiny", steps=STEPS, samples=20, max_interval=LONGEST, prompts=[1, 2, 3])


@pytest.fixture(scope="module")
def replays(pipe, profile):
    return [Replay(pipe, profile.sampler, [1, 2], seeds) for seeds in ([0, 1], [900, 901])]


def test_random_schedules_are_different_and_keep_to_count_and_interval():
    found = random_columns(20, 6, 5, 50)
    assert len(set(found)) == 50
    for columns in found:
        anchors = anchors_of(columns)
        assert anchors[0] == 0
        assert len(anchors) == 6
        assert longest_interval(anchors, 20) <= 5
        assert columns_at(anchors, 20) == columns
    assert random_columns(20, 6, 5, 50) == found
    assert random_columns(20, 6, 5, 50, seed=1) != found
    assert sorted(random_columns(4, 2, 3, 3)) == ["C..C", "C.C.", "CC.."]


def test_the_oracle_has_every_schedule_with_both_ends_full():
    every = every_column(20, 6)
    assert len(set(every)) == len(every) == 3060
    assert all(columns[0] == columns[-1] == "C" and columns.count("C") == 6 for columns in every)


def test_a_walk_visits_every_schedule_once_and_takes_shared_beginnings_once():
    every, taken = every_column(9, 4), list[str]()

    def advance(state: str, step: int, columns: str) -> str:
        assert state == columns[:step]
        taken.append(columns[: step + 1])
        return columns[: step + 1]

    assert [(columns, columns) for columns in sorted(every)] == list(walk([*every, every[3]], str, advance))
    assert len(taken) == len(set(taken))
    assert set(taken) == {columns[:n] for columns in every for n in range(1, 10)}


def test_what_was_found_outlives_an_interruption_and_is_not_asked_again(tmp_path):
    wanted, asked = ["CC.", "C.C", "C.."], list[str]()

    def some(missing):
        for columns in missing:
            asked.append(columns)
            if len(asked) == 2:
                raise KeyboardInterrupt
            yield columns, np.array([1.0, 2.0])

    truths = Truths(tmp_path / "a.json", {"seed": 1})
    truths.gather(wanted[:0], some)
    assert not asked
    with pytest.raises(KeyboardInterrupt):
        truths.gather(wanted, some)
    truths = Truths(tmp_path / "a.json", {"seed": 1})
    truths.gather(wanted, some)
    assert asked == ["CC.", "C.C", "C.C", "C.."]
    again = Truths(tmp_path / "a.json", {"seed": 1})
    assert again.found == truths.found == {columns: [1.0, 2.0] for columns in wanted}
    assert not Truths(tmp_path / "a.json", {"seed": 2}).found


def test_shared_beginnings_change_no_distance(profile, replays):
    calibration, held_out = replays
    every = [columns_at(a, STEPS) for a in ([0, 3, 6, 9], [0, 3, 4, 9], [0, 1, 2, 3], [0, 3, 6, 7])]
    own = held_out.update
    found = dict(proxy_truth.reused(held_out, profile, every))
    assert list(found) == sorted(every)
    for columns in every:
        schedule = draw_schedule(profile.model, profile.sampler, anchors_of(columns), {})
        with attached(held_out, schedule) as handle:
            stepper = Stepper(ReplaySpace(held_out, handle.executor.clock if handle else None), own.history)
            at = stepper.start()
            for step in range(STEPS):
                at = stepper.moved(stepper.computed(at, step), step, own.coefficients[step])
        np.testing.assert_allclose(found[columns], fidelity_db(at.x, held_out), atol=1e-4)
    for columns, distances in proxy_truth.refitted(calibration, held_out, every):
        (name,) = profile.model.transformers
        jumps = draw_steps(profile.model, profile.sampler, {name: anchors_of(columns)}, "-")
        fitted, on_calibration = fit_update(calibration, jumps)
        np.testing.assert_allclose(distances, [*sampled_distances(held_out, fitted), *on_calibration], atol=1e-3)


def test_open_loop_updates_and_forecasts_are_exact_where_every_step_is_full(profile, replays):
    full = ["C" * STEPS]
    ((_, by_forecast),) = proxy_truth.forecast(replays[1], profile, full)
    ((_, by_reuse),) = proxy_truth.reused(replays[1], profile, full)
    assert min(by_forecast.min(), by_reuse.min()) > 90
    every = [columns_at(range(STEPS), STEPS), columns_at([0, 5], STEPS)]
    found = dict(proxy_truth.updated(replays[1], proxy_study.span_of(profile), every))
    assert found[every[0]].mean() > found[every[1]].mean()
    some = dict(
        proxy_truth.forecast(replays[1], profile, [columns_at([0, 2, 4, 6, 8], STEPS), columns_at([0, 5], STEPS)])
    )
    assert some["C.C.C.C.C."].mean() > some["C....C...."].mean()


def test_every_prediction_finds_a_schedule_with_far_fewer_full_steps_worse(profile):
    good, bad = [0, 1, 2, 3, 4, 5, 7, 8, 9], [0, 5]
    for predict in predictors(profile):
        assert 0 < predict(good) < predict(bad) < np.inf, predict.key
        assert predict([0]) == np.inf or predict.key.startswith("residual"), predict.key
    for family in proxy_study.FAMILIES:
        for key, (_, predict) in simulations(profile, family).items():
            assert 0 < predict(good) < predict(bad), (family, key)
            if family != "updates":
                assert predict(range(STEPS)) < 1e-5, (family, key)


def test_the_sum_over_intervals_is_what_the_dynamic_program_minimises(profile):
    products = next(iter(profile.site_products().values()))
    for history in (1, 2, 3):
        segment = segment_costs(products, history, LONGEST, ridge(1e-4), 2.0)
        anchors, cost = place_full_steps(segment, FULL)[FULL]
        assert summed(segment, anchors) == pytest.approx(cost)
        others = [summed(segment, anchors_of(columns)) for columns in random_columns(STEPS, FULL, LONGEST, 30)]
        assert min(others) >= cost * (1 - 1e-9)


def test_a_policy_that_begins_with_full_steps_places_them():
    segment = np.zeros((6, 7))
    segment[:, 2:] = 1.0
    assert Predictor("a", "a", segment, first=3).placed(4)[:3] == [0, 1, 2]


def test_agreement_is_one_for_one_order_and_its_interval_tells_noise():
    error = np.arange(40.0)
    assert agreement(error**3, error) == {"rho": 1.0, "low": 1.0, "high": 1.0}
    assert agreement(-error, error)["rho"] == -1.0
    noise = agreement(np.random.default_rng(0).normal(size=40), error)
    assert noise["low"] < 0 < noise["high"]


def test_regret_counts_from_the_best_and_ranks():
    distances = {"a": 10.0, "b": 12.5, "c": 20.0, "d": 9.0}
    assert regret(distances, "c") == {"db": 20.0, "regret_db": 0.0, "better": 0.0}
    assert regret(distances, "a") == {"db": 10.0, "regret_db": 10.0, "better": 0.5}


def test_placements_are_compared_generation_by_generation():
    placed = {SOLVER: "C..", "better": "CC.", "same": "C.."}
    truth = {"C..": [10.0, 30.0, 20.0], "CC.": [12.0, 33.0, 21.0, 99.0]}  # the fourth was fitted on
    rows = {row["name"]: row for row in compared(placed, truth, 3)}
    assert rows["same"] == rows[SOLVER] | {"name": "same"}
    assert rows[SOLVER]["gain_db"] == rows[SOLVER]["low"] == rows[SOLVER]["high"] == 0.0
    assert (rows["better"]["db"], rows["better"]["gain_db"]) == (22.0, 2.0)
    assert 1.0 <= rows["better"]["low"] < 2.0 < rows["better"]["high"] <= 3.0


def test_growing_intervals_grow():
    assert growing(20, 6) == [0, 1, 4, 8, 13, 19]


def test_the_whole_study_from_distances_to_page(profile, tmp_path):
    """The true distances are made from one prediction: that one must agree perfectly and have no regret."""
    every = every_column(STEPS, FULL)
    by_key = {p.key: p for p in predictors(profile)}
    truth_of = lambda columns: [-10 * np.log10(by_key["residual-squared"](anchors_of(columns)))] * 4  # noqa: E731
    placed = placements(profile, every, FULL)
    free = [one["free"] for one in placed if one["free"]]
    truth = {columns: truth_of(columns) for columns in [*every, *free]}
    of_random = study(profile, "updates", truth, every)
    assert of_random["schedules"] == sum(longest_interval(anchors_of(c), STEPS) <= LONGEST for c in every) < len(every)
    rho = {one["key"]: one["rho"] for one in of_random["predictors"]}
    assert rho["residual-squared"] == 1.0
    assert rho["cosine"] < 1.0
    found = oracle(placed, truth, every, 2)
    rows = {row["key"]: row for row in found["rows"]}
    assert rows["residual-squared"]["regret_db"] == 0.0
    assert rows["calibrated"]["regret_db"] == 0.0
    assert rows["residual-squared"]["free_db"] >= rows["residual-squared"]["db"]
    assert max(row["regret_db"] for row in found["rows"]) > 0
    result = {
        "command": "make proxies", "machine": "a machine", "versions": {"torch": "2"},
        "random": {"updates": of_random}, "all": {"updates": of_random},
        "placements": {"4": compared({one["name"]: one["chosen"] for one in placed}, truth, 2)},
        "oracle": {"steps": STEPS, "full": FULL, "updates": found},
    }  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    fill(page, result)
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{BEGIN}\n\n{tables(result)}\n\n{END}\nafter\n"
    assert "**1.00** [1.00, 1.00]" in text
    assert f"| {found['best_db']:.1f} | 0.0 |" in text
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="around the tables"):
        fill(page, result)
