"""Replaying steps, and fitting an update on the accelerated trajectory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.errors import MismatchError, UnsupportedModelError
from sodaprof.formats.cost import cost_of
from sodaprof.pipelines.replay import Replay, ReplaySpace
from sodaprof.tuning.candidates import fit_to_model
from sodaprof.tuning.closed_loop import fit_update, sampled_distances
from tests.tiny_pipelines import TwoPassPipeline, schedule_for, tiny_pipe
from tests.tuning.conftest import STEPS, replay_of, sampled_db
from tests.updated import RESTING, set_sampler, updated


@pytest.fixture
def compiled(profile):
    return compile_schedule(profile.folder, "3.0x")


@pytest.mark.parametrize("kind", [None, TwoPassPipeline])
def test_a_replay_gives_the_outputs_that_the_scheduler_was_given(kind):
    pipe = tiny_pipe(cls=kind) if kind else tiny_pipe()
    sampler = schedule_for(pipe, steps=STEPS).sampler
    replay = Replay(pipe, sampler, [1, 2], [5, 6])
    assert replay.states.shape == (STEPS + 1, 2, 4, 8, 8)
    for step in (0, 5, STEPS - 1):
        torch.testing.assert_close(replay.output(step, replay.states[step]), replay.outputs[step], rtol=1e-6, atol=1e-6)
    moved = replay.output(5, replay.states[5] + 0.1)
    assert (moved - replay.outputs[5]).abs().max() > 1e-3
    assert "step" not in vars(pipe.scheduler)


def test_a_step_method_that_the_user_replaced_is_kept(pipe, monkeypatch):
    own = lambda *args, **kwargs: type(pipe.scheduler).step(pipe.scheduler, *args, **kwargs)  # noqa: E731
    monkeypatch.setitem(vars(pipe.scheduler), "step", own)
    sampler = schedule_for(pipe, steps=STEPS).sampler
    assert vars(pipe.scheduler)["step"] is own  # the first step was recorded
    with pytest.raises(UnsupportedModelError, match=r"del scheduler\.step"):
        Replay(pipe, sampler, [1], [5])
    assert vars(pipe.scheduler)["step"] is own


def test_a_replay_refuses_a_pipeline_that_carries_a_schedule(pipe, profile):
    with sodaprof.apply(pipe, schedule_for(pipe)), pytest.raises(MismatchError, match="carries a schedule"):
        replay_of(pipe, profile, [0])


def test_the_closed_loop_fit_is_nearer_than_the_open_loop_fit(pipe, profile, compiled):
    replay = replay_of(pipe, profile, range(8))
    before = sampled_distances(replay, compiled)
    fitted, distances = fit_update(replay, compiled)
    assert fitted.update.fitted["loop"] == "closed"
    assert distances.mean() > before.mean()
    np.testing.assert_allclose(sampled_distances(replay, fitted), distances, atol=1e-3)


def test_the_fitted_schedule_reaches_in_the_pipeline_the_distance_of_the_replay(pipe, profile, compiled):
    replay = replay_of(pipe, profile, [3])
    fitted, distances = fit_update(replay, compiled)
    assert sampled_db(pipe, fitted, [1], seed=3) == pytest.approx(distances, abs=0.1)


def test_the_noise_of_a_stochastic_sampler_is_kept_and_not_fitted():
    pipe = tiny_pipe()
    set_sampler(pipe, "ddpm")
    whole, resting = updated(pipe), updated(pipe, RESTING)
    torch.manual_seed(11)  # as `sample`: this pipeline hands its generator to nobody
    replay = Replay(pipe, whole.sampler, [1, 2], [0, 1])
    assert ReplaySpace(replay).noise(2).abs().max() > 0.1
    _, distances = fit_update(replay, whole)
    assert distances.min() > 80
    fitted, distances = fit_update(replay, resting)
    assert sampled_db(pipe, fitted, (1, 2)) == pytest.approx(distances, abs=0.02)


def test_reuse_with_a_fitted_update_is_nearer_than_reuse_alone(pipe, profile):
    fora = compile_schedule(profile.folder, "2.0x", "fora")
    fitted, distances = fit_to_model(pipe, profile, fora, cost_of(profile.folder, "flops"), samples=4)
    assert fitted.transformers == fora.transformers
    assert fitted.predicted["speedup"] == pytest.approx(fora.predicted["speedup"], rel=0.02)
    assert len(distances) == 4
    assert "step" not in vars(pipe.scheduler)
    alone, corrected = (sampled_db(pipe, schedule, [1, 2], seed=50).mean() for schedule in (fora, fitted))
    assert corrected > alone
