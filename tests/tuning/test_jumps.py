"""Full steps as jumps: their closed-loop fit, and the joint fit of weights and network times."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.errors import UnsupportedModelError
from sodaprof.pipelines.entries import default_prompts
from sodaprof.pipelines.replay import Replay
from sodaprof.tuning.closed_loop import fit_update
from sodaprof.tuning.joint_fit import (
    AdamState,
    JointFit,
    begin_adam,
    continue_adam,
    gauss_newton,
    whitening,
    within_reach,
)
from sodaprof.tuning.jumps import (
    Batch,
    Form,
    decoder_of,
    distances,
    fit_jumps,
    forms_of,
    frozen,
    jumps_of,
    score_db,
)
from sodaprof.tuning.refine import refine
from tests.tiny_pipelines import TwoPassPipeline, schedule_for, tiny_pipe
from tests.tuning.conftest import LABELS, STEPS, replay_of, sampled_db
from tests.updated import sample

STARTS = (0, 2, 5, 8)


@pytest.fixture
def batches(pipe, profile):
    decode = decoder_of(pipe)
    return [Batch(replay_of(pipe, profile, part), decode) for part in (range(3), range(3, 6))]


@pytest.fixture
def compiled(profile):
    return compile_schedule(profile.folder, "3.0x")


def moved(jumps, seed=0):
    """Jumps with weights and times a little off."""
    source = np.random.default_rng(seed)
    weights = tuple(w + 0.01 * source.standard_normal(len(w)) for w in jumps.weights)
    return dataclasses.replace(jumps, weights=weights, times=jumps.times - source.uniform(0, 5, len(jumps.times)))


def test_a_fit_in_the_samplers_own_basis_is_as_near_as_the_fit_step_by_step(pipe, profile, compiled):
    replay = replay_of(pipe, profile, range(8))
    _, by_steps = fit_update(replay, compiled)
    found, by_jumps = fit_jumps([Batch(replay, lambda x: x)], jumps_of(compiled).starts, Form("output", 4))
    energy = replay.states[-1].double().square().mean().log10() * 10
    assert abs(float(by_jumps.mean() + energy) - by_steps.mean()) < 0.5
    assert found.basis == "output"


def test_parts_of_the_generations_give_the_same_fit_as_all_at_once(pipe, profile, batches):
    whole = [Batch(replay_of(pipe, profile, range(6)), decoder_of(pipe))]
    for form in (Form("data", 3), Form("output", 4)):
        (at_once, a), (in_parts, b) = fit_jumps(whole, STARTS, form), fit_jumps(batches, STARTS, form)
        for one, other in zip(at_once.weights, in_parts.weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(a, b, atol=0.05)


def test_what_is_written_runs_as_it_was_fitted(pipe, compiled, batches):
    found, fitted_db = fit_jumps(batches, jumps_of(compiled).starts, Form("data", 3))
    written = found.written_to(compiled, {"loop": "closed"})
    again = jumps_of(written)
    assert again.starts == found.starts
    for one, other in zip(found.weights, again.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    latents = batches[0].run(found)[0][-1] / pipe.vae.config.scaling_factor
    with sodaprof.apply(pipe, written):
        sampled = sample(pipe, LABELS, STEPS)
    np.testing.assert_allclose(sampled, latents, rtol=1e-3, atol=1e-4)
    assert len(fitted_db) == 6


@pytest.mark.parametrize("kind", [None, TwoPassPipeline])
def test_gradients_are_those_of_finite_differences(kind):
    pipe = tiny_pipe(cls=kind) if kind else tiny_pipe()
    replay = Replay(pipe, schedule_for(pipe, steps=STEPS).sampler, [1, 2], [5, 6])
    batch = Batch(replay, decoder_of(pipe))
    start, _ = fit_jumps([batch], STARTS, forms_of(replay, 4)[0])
    fit = JointFit(moved(start), [batch])
    gradient, at, size = fit.gradient(batch, fit.zero), fit.zero, 1e-3
    for number in (0, 3, len(at) - 2, len(at) - 1):
        step = np.zeros_like(at)
        step[number] = size
        difference = (fit.loss(at + step) - fit.loss(at - step)) / (2 * size)
        assert gradient[number] == pytest.approx(difference, rel=0.02, abs=5e-3)


def test_weights_keep_their_gradients_after_a_fit(pipe):
    before = [p.requires_grad for p in pipe.transformer.parameters()]
    with frozen(pipe.transformer, None):
        assert not any(p.requires_grad for p in pipe.transformer.parameters())
    assert [p.requires_grad for p in pipe.transformer.parameters()] == before


def test_a_run_continues_from_known_states(batches):
    start, _ = fit_jumps(batches, STARTS, Form("data", 3))
    states, values = batches[0].run(start)
    changed = dataclasses.replace(start, weights=(*start.weights[:2], *moved(start).weights[2:]))
    whole, _ = batches[0].run(changed)
    continued, _ = batches[0].run(changed, 2, states, values[:3])
    torch.testing.assert_close(continued[-1], whole[-1], rtol=0, atol=0)


def test_adam_and_gauss_newton_lower_the_loss_and_adam_can_be_continued(batches):
    start, _ = fit_jumps(batches, STARTS, Form("data", 3))
    fit = JointFit(start, batches)
    least = fit.loss(fit.zero)
    with frozen(batches[0].replay.module):
        begun = begin_adam(fit, 12, 0)
        copied = AdamState(begun.at, begun.mean, begun.square, begun.size, begun.iterations)
        *_, last = continue_adam(fit, begun, 12, 0)
        *_, again = continue_adam(fit, copied, 12, 0)
    assert fit.loss(np.array(last.at)) < least
    np.testing.assert_allclose(last.at, again.at, rtol=1e-6, atol=1e-9)
    *_, rounds = gauss_newton(fit, 2)
    assert fit.loss(rounds) < least
    assert distances(fit.jumps(rounds), batches).mean() > distances(start, batches).mean()


def test_regressors_are_orthonormal_after_whitening():
    rows = np.random.default_rng(0).standard_normal((3, 1000))
    rows[2] += rows[1]
    t = whitening(rows @ rows.T / 1000)
    np.testing.assert_allclose(t @ (rows @ rows.T / 1000) @ t.T, np.eye(3), atol=1e-6)


def test_times_keep_their_order():
    grid = np.array([900.0, 600.0, 100.0])
    found = within_reach(np.array([990.0, 50.0, 400.0]), grid)
    np.testing.assert_allclose(found, [900, 350, 350])
    np.testing.assert_allclose(within_reach(grid - 3, grid), grid - 3)


def test_refine_fits_jointly_after_the_search(pipe, compiled, tmp_path):
    parts = []
    settings = {"evaluations": 2, "samples": 8, "iterations": 10}
    search = refine(pipe, compiled, tmp_path / "search.json", evaluations=2, samples=8, method="none")
    joint = refine(
        pipe, compiled, tmp_path / "joint.json", **settings, on_progress=lambda part, done, db: parts.append(part)
    )
    assert search.update.fitted["loop"] == "closed"
    assert joint.update.fitted["loop"] == "joint"
    assert list(dict.fromkeys(parts)) == ["placements", "jumps"]
    unseen = [sampled_db(pipe, schedule, LABELS * 2, seed=100).mean() for schedule in (search, joint)]
    assert unseen[1] > unseen[0] - 1
    again = refine(pipe, compiled, tmp_path / "again.json", **settings)
    assert again.digest() == joint.digest()


@pytest.mark.parametrize("method", ["adam", "gauss-newton"])
def test_an_interrupted_joint_fit_continues(pipe, compiled, tmp_path, method):
    settings = {"evaluations": 1, "samples": 8, "iterations": 12, "method": method}
    whole = refine(pipe, compiled, tmp_path / "whole.json", **settings)

    def interrupt(part, done, db):
        if part == "jumps" and done > 5:
            raise KeyboardInterrupt

    if method == "adam":
        with pytest.raises(KeyboardInterrupt):
            refine(pipe, compiled, tmp_path / "parts.json", **settings, on_progress=interrupt)
    continued = refine(pipe, compiled, tmp_path / "parts.json", **settings)
    assert continued.digest() == whole.digest()


def test_refining_again_begins_at_what_was_refined(pipe, compiled, tmp_path):
    settings = {"evaluations": 0, "samples": 8}
    once = refine(pipe, compiled, tmp_path / "once.json", iterations=15, **settings)
    scores, entries = [], [default_prompts(pipe)[i] for i in (6, 7)]
    again = refine(
        pipe, once, tmp_path / "again.json", iterations=5, **settings, on_progress=lambda *now: scores.append(now)
    )
    batch = Batch(Replay(pipe, once.sampler, entries, [6, 7]), decoder_of(pipe))
    reached = [score_db(distances(jumps_of(schedule), [batch])) for schedule in (once, again)]
    assert reached[1] >= reached[0] - 1e-4
    assert scores[-1][2] == pytest.approx(reached[1], abs=1e-3)


def test_a_joint_fit_of_other_steps_is_refused(pipe, profile, tmp_path):
    drift = compile_schedule(profile.folder, "2.0x", "drift")
    with pytest.raises(UnsupportedModelError, match="full and skipped steps alone"):
        refine(pipe, drift, tmp_path / "a.json", evaluations=0, samples=8, method="adam")
    assert not list(tmp_path.glob("a.json*"))
