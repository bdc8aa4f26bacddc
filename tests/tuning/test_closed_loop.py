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
from sodaprof.tuning.closed_loop import fit_to_model, fit_update, sampled_distances
from tests.tiny_pipelines import TwoPassPipeline, draw, schedule_for, tiny_pipe
from tests.updated import RESTING, sample, set_sampler, updated

STEPS = 12


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def profile(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("closed") / "profile"
    return sodaprof.profile(pipe, folder, name="tiny", steps=STEPS, samples=8, max_interval=4, prompts=[1, 2, 3])


@pytest.fixture
def compiled(profile):
    return compile_schedule(profile.folder, "3.0x")


def replay_of(pipe, profile, seeds):
    return Replay(pipe, profile.sampler, [1 + seed % 3 for seed in seeds], seeds)


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
    with sodaprof.apply(pipe, fitted):
        found = sample(pipe, [1], STEPS, seed=3)
    full = sample(pipe, [1], STEPS, seed=3)
    ratio = np.square(full).mean() / np.square(found - full).mean()
    assert 10 * np.log10(ratio) == pytest.approx(float(distances[0]), abs=0.1)


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
    full = sample(pipe, (1, 2))
    with sodaprof.apply(pipe, fitted):
        error = np.square(sample(pipe, (1, 2)) - full).reshape(2, -1).mean(1)
    assert 10 * np.log10(np.square(full).mean() / error) == pytest.approx(distances, abs=0.02)


def test_reuse_with_a_fitted_update_is_nearer_than_reuse_alone(pipe, profile):
    soda = compile_schedule(profile.folder, "2.0x", "fora")
    fitted, distances = fit_to_model(pipe, profile, soda, cost_of(profile.folder, "flops"), samples=4)
    assert fitted.transformers == soda.transformers
    assert fitted.predicted["speedup"] == pytest.approx(soda.predicted["speedup"], rel=0.02)
    assert len(distances) == 4
    assert "step" not in vars(pipe.scheduler)
    full, errors = draw(pipe, [1, 2], STEPS, seed=50), []
    for schedule in (soda, fitted):
        with sodaprof.apply(pipe, schedule):
            errors.append(float(np.square(draw(pipe, [1, 2], STEPS, seed=50) - full).mean()))
    assert errors[1] < errors[0]
