"""Replaying steps, fitting an update on the accelerated trajectory, searching full steps on the final error."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.closed_loop import fit_to_model, fit_update, play
from sodaprof.compiler import compile_schedule
from sodaprof.cost import cost_of
from sodaprof.errors import BudgetError, FormatError, MismatchError, UnsupportedModelError
from sodaprof.models.replay import Replay
from sodaprof.refine import columns_of, drawn, proposed, refine
from sodaprof.schedule import load_schedule

from .pipelines import TwoPassPipeline, draw, schedule_for, tiny_pipe

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


def test_a_replay_refuses_a_pipeline_that_carries_a_schedule(pipe, profile):
    with sodaprof.apply(pipe, schedule_for(pipe)), pytest.raises(MismatchError, match="carries a schedule"):
        replay_of(pipe, profile, [0])


def test_the_fit_on_the_accelerated_trajectory_beats_the_open_one_there(pipe, profile, compiled):
    replay = replay_of(pipe, profile, range(8))
    before = play(replay, compiled)
    fitted, distances = fit_update(replay, compiled, 4)
    assert fitted.update.fitted["loop"] == "closed"
    assert distances.mean() > before.mean()
    np.testing.assert_allclose(play(replay, fitted), distances, atol=1e-3)


def test_the_fitted_schedule_gives_in_the_pipeline_what_the_replay_saw(pipe, profile, compiled):
    replay = replay_of(pipe, profile, [3])
    fitted, distances = fit_update(replay, compiled, 4)
    arguments = {"class_labels": [1], "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 4.0}
    with sodaprof.apply(pipe, fitted):
        found = pipe(**arguments, generator=[torch.Generator().manual_seed(3)]).images
    full = pipe(**arguments, generator=[torch.Generator().manual_seed(3)]).images
    if found.min() >= 0:  # diffusers decodes what it calls latents, too
        assert np.abs(np.asarray(found) - np.asarray(full)).max() > 0
    else:
        ratio = full.square().mean() / (found - full).square().mean()
        assert 10 * torch.log10(ratio).item() == pytest.approx(float(distances[0]), abs=0.1)


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


def test_columns_are_read_and_drawn_again(compiled, pipe):
    columns = columns_of(compiled)
    assert columns.count("C") == 4
    assert columns_of(drawn(compiled, columns)) == columns
    mixed = replace(compiled, transformers=schedule_for(pipe, steps=STEPS).transformers)
    key = next(iter(mixed.transformers["transformer"].rows))
    plan = mixed.transformers["transformer"]
    plan = replace(plan, rows=plan.rows | {key: "CR" + "C" * (STEPS - 2)})
    with pytest.raises(UnsupportedModelError, match="step 1 holds CR"):
        columns_of(replace(mixed, transformers={"transformer": plan}))


def test_proposals_keep_the_first_step_and_the_number_of_full_ones():
    import random

    generator, known = random.Random(0), {"C--C--C-"}
    for _ in range(12):
        found = proposed("C--C--C-", generator, known)
        assert found is not None
        assert found not in known
        assert found[0] == "C"
        assert found.count("C") == 3
        known.add(found)
    assert proposed("CCC", generator, set()) is None


def test_a_search_is_reproducible_resumable_and_never_worse(pipe, profile, compiled, tmp_path):
    whole = refine(pipe, compiled, tmp_path / "whole.json", evaluations=14, samples=8)
    assert columns_of(whole).count("C") == 4
    assert load_schedule(tmp_path / "whole.json").digest() == whole.digest()
    refine(pipe, compiled, tmp_path / "parts.json", evaluations=5, samples=8)
    seen = []
    parts = refine(
        pipe, compiled, tmp_path / "parts.json", evaluations=14, samples=8, on_progress=lambda *now: seen.append(now)
    )
    assert parts.digest() == whole.digest()
    assert seen[0][0] == 5
    assert [search for _, search, _ in seen] == sorted(search for _, search, _ in seen)
    assert [held for *_, held in seen] == sorted(held for *_, held in seen)


def test_a_search_of_other_settings_and_a_broken_state_are_refused(pipe, compiled, tmp_path):
    refine(pipe, compiled, tmp_path / "a.json", evaluations=1, samples=8)
    with pytest.raises(MismatchError, match="another schedule or with other settings"):
        refine(pipe, compiled, tmp_path / "a.json", evaluations=1, samples=8, seed=1)
    state = tmp_path / "a.json.search"
    state.write_text(json.dumps({"format": "sodaprof.refine", "version": 9}))
    with pytest.raises(FormatError, match="Delete it"):
        refine(pipe, compiled, tmp_path / "a.json", evaluations=1, samples=8)
    state.unlink()
    with pytest.raises(FormatError, match="exists"):
        refine(pipe, compiled, tmp_path / "a.json", evaluations=1, samples=8)


def test_an_interrupted_search_leaves_a_whole_schedule(pipe, compiled, tmp_path):
    def stop(done: int, search: float, held: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(pipe, compiled, tmp_path / "a.json", evaluations=9, samples=8, on_progress=stop)
    assert load_schedule(tmp_path / "a.json").update.fitted["loop"] == "closed"
    refine(pipe, compiled, tmp_path / "a.json", evaluations=4, samples=8)


@pytest.mark.parametrize(
    ("settings", "message"), [({}, "needs an end"), ({"evaluations": 1, "samples": 2}, "--samples")]
)
def test_settings_without_sense_are_refused(pipe, compiled, tmp_path, settings, message):
    with pytest.raises(BudgetError, match=message):
        refine(pipe, compiled, tmp_path / "a.json", **settings)
