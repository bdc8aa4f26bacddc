"""Candidates measured on the model: policy `mix`, and the period N of ToCa; budget and memory with an update."""

from __future__ import annotations

import json

import numpy as np
import pytest
from msgspec.structs import replace

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.compiler.problem import cache_bytes
from sodaprof.errors import BudgetError, FormatError, MismatchError
from sodaprof.formats.cost import cost_of
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.measure.metrics import psnr_db
from sodaprof.pipelines.replay import Replay
from sodaprof.tuning.candidates import CANDIDATES, choose_period, fit_to_model, mix
from sodaprof.tuning.closed_loop import (
    calibration_replay,
    fit_update,
    sampled_distances,
    with_predicted_cost,
)
from sodaprof.tuning.jumps import Batch, decoder_of, distances, jumps_of, score_db
from tests.tiny_pipelines import draw, mixed_schedule, schedule_for, tiny_pipe
from tests.tuning.conftest import STEPS, sampled_db
from tests.updated import sample, set_sampler


@pytest.fixture(scope="module")
def mixed(pipe, profile):
    return mix(pipe, profile.folder, "2.0x")


def test_every_candidate_meets_the_budget_and_the_nearest_is_taken(mixed, tmp_path):
    best, candidates, left_out = mixed
    assert not left_out
    assert {one.name for one in candidates} == set(CANDIDATES)
    for one in candidates:
        assert one.schedule.predicted["speedup"] >= 2.0 - 1e-9, one.name
        assert one.name.endswith("update") == (one.schedule.update is not None)
        assert (one.schedule.update is None) or one.schedule.update.fitted["loop"] == "closed"
    scores = [score_db(one.distances) for one in candidates]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert best.transformers == candidates[0].schedule.transformers
    best.save(tmp_path / "best.json")
    policy = load_schedule(tmp_path / "best.json").policy
    assert policy["name"] == "mix"
    assert policy["knobs"]["best"] == candidates[0].name
    figures = policy["knobs"]["candidates"][candidates[-1].name]
    assert figures["mean_db"] == pytest.approx(candidates[-1].distances.mean(), abs=1e-3)


def test_the_score_is_the_mean_of_mean_and_worst_tenth():
    assert score_db(np.arange(20.0)) == (9.5 + 0.5) / 2


@pytest.mark.parametrize("name", CANDIDATES)
def test_what_a_candidate_measures_is_what_the_pipeline_does(pipe, mixed, name):
    one = next(c for c in mixed[1] if c.name == name)
    assert one.distances == pytest.approx(sampled_db(pipe, one.schedule, (1, 2, 3, 1, 2, 3, 1, 2)), abs=0.02)


def test_a_replay_runs_pruned_reused_and_forecast_cells_as_the_pipeline_does(pipe):
    schedule = mixed_schedule(pipe)
    replay = Replay(pipe, schedule.sampler, [1, 2], [0, 1])
    assert sampled_distances(replay, schedule) == pytest.approx(sampled_db(pipe, schedule, (1, 2)), abs=0.02)


def test_a_schedule_that_computes_everything_is_at_no_distance(pipe, profile):
    replay = calibration_replay(pipe, profile, 2)
    assert sampled_distances(replay, schedule_for(pipe, steps=STEPS)).min() > 90
    soda = compile_schedule(profile.folder, 2.0, "soda")
    assert sampled_distances(replay, soda).max() < 90
    assert "step" not in vars(pipe.scheduler)


def test_what_cannot_be_met_is_left_out_with_its_reason(pipe, profile):
    small = compile_schedule(profile.folder, 2.0, "solver").predicted["cache_bytes"] // 4  # one latent of four
    best, candidates, left_out = mix(pipe, profile.folder, 2.0, max_cache=small, samples=2)
    assert [one.name for one in candidates] == ["solver + update"]
    assert best.update.history == 1
    assert set(left_out) == {"drift + update", "drift", "forecast + update", "forecast", "soda + update", "soda"}
    assert all("--max-cache" in reason for reason in left_out.values())
    _, candidates, left_out = mix(pipe, profile.folder, 6.0, samples=2)  # intervals above 4: only steps without network
    assert [one.name for one in candidates] == ["solver + update"]
    assert "cannot be met" in left_out["soda"]
    with pytest.raises(BudgetError, match=r"No action meets the budget. solver \+ update: .*cannot be met"):
        mix(pipe, profile.folder, 1000, samples=2)


def test_another_sampler_than_the_profiles_is_refused(profile):
    other, schedule = tiny_pipe(), compile_schedule(profile.folder, 2)
    set_sampler(other, "unipc")
    message = "is for DDIMScheduler, the pipeline has UniPCMultistepScheduler"
    with pytest.raises(MismatchError, match=message):
        mix(other, profile.folder, 2.0, samples=2)
    with pytest.raises(MismatchError, match=message):
        fit_to_model(other, profile, schedule, cost_of(profile.folder, "flops"), samples=2)


def test_a_budget_leaves_room_for_the_update(pipe, profile, tmp_path):
    data = json.loads((profile.folder / "cost.flops.json").read_text())
    step = cost_of(profile.folder, "flops").transformers["transformer"].full
    data["loop"] |= {"scheduler": 0.0, "update": 0.1 * step}
    (tmp_path / "cost.json").write_text(json.dumps(data))
    table = cost_of(profile.folder, tmp_path / "cost.json")
    replay = calibration_replay(pipe, profile, 2)
    reached = []
    for updated in (False, True):
        schedule = compile_schedule(profile.folder, 2.0, "soda", tmp_path / "cost.json", updated=updated)
        fitted, _ = fit_update(replay, schedule)
        reached.append(with_predicted_cost(fitted, table).predicted["speedup"])
    assert reached[0] < 1.95
    assert 2.0 - 1e-9 <= reached[1] < 2.4
    with pytest.raises(BudgetError, match=r"A budget of 2.4x cannot be met"):
        compile_schedule(profile.folder, 2.4, "soda", tmp_path / "cost.json", updated=True)


def test_an_update_to_come_is_counted_in_the_memory(pipe, profile):
    plain = compile_schedule(profile.folder, 2.0, "drift")
    latents = 4 * 4 * 8 * 8  # bytes of one
    kept = plain.predicted["cache_bytes"]
    wide = compile_schedule(profile.folder, 2.0, "drift", max_cache=kept + 4 * latents, updated=True)
    cut = compile_schedule(profile.folder, 2.0, "drift", max_cache=kept + 4 * latents - 1, updated=True)
    assert (wide.update.history, cut.update.history) == (4, 3)
    assert cut.predicted["cache_bytes"] == cache_bytes(cut, profile.model) == kept + 3 * latents
    fewer = compile_schedule(profile.folder, 2.0, "drift", max_cache=kept, updated=True)
    assert fewer.policy["knobs"]["K"] < plain.policy["knobs"]["K"]
    with sodaprof.apply(pipe, replace(cut, update=None)):
        without = sample(pipe, (1,), STEPS)
    with sodaprof.apply(pipe, cut):  # until it is fitted the update is the sampler's own steps
        found = sample(pipe, (1,), STEPS)
    # Each of the 12 steps weighs 5 numbers in single precision: 5 products and 4 sums, each within 2⁻²⁴ of the largest.
    # The network adds nothing to that: in double precision the update's 9 digits, 5e-10, come to 3e-9.
    assert abs(found - without).max() <= 12 * 9 * 2**-24 * abs(without).max()


# ---- the period of toca and duca --------------------------------------------------------------------------------------


def test_the_period_nearest_to_the_full_run_is_kept(pipe, profile):
    tried = choose_period(pipe, profile.folder, 1.5, "toca")
    assert [one.score for one in tried] == sorted((one.score for one in tried), reverse=True)
    assert tried[0].score > tried[-1].score
    assert tried[0].schedule.predicted["speedup"] >= 1.5
    labels = [1, 2, 3, 1, 2, 3, 1, 2]
    plain = draw(pipe, labels, STEPS, seed=0)
    for one in tried:
        period = one.schedule.policy["knobs"]["N"]
        assert one.name == f"N={period}"
        with sodaprof.apply(pipe, compile_schedule(profile.folder, 1.5, "toca", knobs={"N": period})):
            pictures = draw(pipe, labels, STEPS, seed=0)
        assert np.mean(psnr_db(pictures, plain)) == pytest.approx(one.score, abs=1e-3)


def test_a_period_is_refused_in_one_message(pipe, profile, tmp_path):
    for policy, budget, knobs, message in (
        ("duca", 1000, {}, "cannot be met with N=8"),
        ("soda", 2, {}, "chooses N for toca and duca"),
        ("toca", 2, {"N": 3}, "leave N out"),
    ):
        with pytest.raises(BudgetError, match=message):
            choose_period(pipe, profile.folder, budget, policy, knobs=knobs)
    for name in ("model.json", "sampler.json", "cost.flops.json"):
        (tmp_path / name).write_bytes((profile.folder / name).read_bytes())
    with pytest.raises(FormatError, match="no calibration seeds"):
        choose_period(pipe, tmp_path, 2, "toca")


def test_the_period_is_chosen_within_the_limit_on_caches(pipe, profile):
    schedule = choose_period(pipe, profile.folder, 1.5, "toca", updated=True)[0].schedule
    kept = schedule.predicted["cache_bytes"]
    assert schedule.predicted["speedup"] >= 1.5 - 1e-9
    cut = choose_period(pipe, profile.folder, 1.5, "toca", updated=True, max_cache=kept - 1)[0].schedule
    assert cut.update.history == 3
    with pytest.raises(BudgetError, match="--max-cache"):
        choose_period(pipe, profile.folder, 1.5, "toca", max_cache=100)


def test_the_fit_of_full_steps_takes_the_best_of_forms_and_placements(pipe, profile):
    compiled = compile_schedule(profile.folder, "3.0x")
    fitted, judged = fit_to_model(pipe, profile, compiled, cost_of(profile.folder, "flops"))
    assert len(fitted.anchors()) == len(compiled.anchors())
    assert len(judged) == 2  # generations 6 and 7
    batch = Batch(Replay(pipe, profile.sampler, [1, 2], [6, 7]), decoder_of(pipe))
    assert score_db(judged) >= score_db(distances(jumps_of(compiled), [batch])) - 1e-6  # the guard
    np.testing.assert_allclose(judged, distances(jumps_of(fitted), [batch]), atol=1e-3)
