"""Metrics by hand, and the evaluation's fairness: controls, seeds, pairing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import norm

import sodaprof
from sodaprof import metrics
from sodaprof.controls import FewerSteps, fewer_steps_at
from sodaprof.errors import MismatchError, SodaprofError
from sodaprof.evaluation import evaluate
from sodaprof.models.classifier import Classifier, load_classifier
from sodaprof.runtime.attach import RUNTIMES

from .pipelines import STEPS, draw, mixed_schedule, schedule_for, tiny_pipe


def test_psnr_by_hand():
    a = np.full((3, 8, 8, 3), 0.5)
    b = a + np.array([0.0, 0.1, -0.01])[:, None, None, None]
    np.testing.assert_allclose(metrics.psnr_db(a, b), [metrics.PSNR_CAP_DB, 20.0, 40.0])


def test_integers_are_refused_because_they_wrap():
    a = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(TypeError, match="wrap"):
        metrics.psnr_db(a, a + 1)


def test_ssim_of_equal_pictures_is_one_and_falls_with_noise():
    rng = np.random.default_rng(0)
    a = rng.random((2, 16, 16, 3))
    np.testing.assert_allclose(metrics.ssim(a, a), 1)
    little, much = (metrics.ssim(a, np.clip(a + s * rng.standard_normal(a.shape), 0, 1)) for s in (0.02, 0.3))
    assert (much < little).all()
    assert (little < 1).all()


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200_000, 2))
    b = rng.standard_normal((200_000, 2)) * [1.0, 3.0] + [2.0, 0.0]
    assert metrics.frechet_distance(a, b) == pytest.approx(2**2 + (3 - 1) ** 2, rel=0.02)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    same = [metrics.kernel_distance(rng.standard_normal((200, 4)), rng.standard_normal((200, 4))) for _ in range(30)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 30**0.5
    assert metrics.kernel_distance(rng.standard_normal((500, 4)), rng.standard_normal((500, 4)) + 1) > 10 * np.std(same)


def test_interval_is_that_of_the_mean():
    values = norm.ppf((np.arange(400) + 0.5) / 400) + 5
    found = metrics.mean_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found["mean"] == pytest.approx(5)
    assert found["low"] == pytest.approx(5 - half, abs=0.02)
    assert found["high"] == pytest.approx(5 + half, abs=0.02)


def test_worst_decile():
    assert metrics.worst_decile(np.arange(40.0)) == 1.5
    assert metrics.worst_decile(np.array([3.0, 1.0])) == 1.0


def test_first_order_solver_on_all_timesteps_is_the_pipelines_own_ddim():
    """The fewer-step control must differ from the full run by its steps alone."""
    pipe = tiny_pipe()
    full = draw(pipe)
    timesteps = tuple(int(t) for t in schedule_for(pipe).sampler.timesteps)
    with FewerSteps("DDIM", "even", STEPS, timesteps).on(pipe):
        np.testing.assert_allclose(draw(pipe), full, atol=2e-4)
    with FewerSteps("DPM++ 2M", "even", STEPS, timesteps).on(pipe):
        assert np.abs(draw(pipe) - full).max() > 1e-4
    assert isinstance(pipe.scheduler, DDIMScheduler)


def test_fewer_steps_keep_the_full_runs_timesteps_and_the_cost():
    pipe = tiny_pipe()
    schedule = mixed_schedule(pipe)
    from sodaprof.models.discover import inspect_pipeline
    from sodaprof.models.flops import count_flops

    model, _, step = inspect_pipeline(pipe, "m", STEPS, 4.0, 0)
    cost = count_flops(pipe, model, step)
    found = fewer_steps_at(schedule, cost)
    own = list(schedule.sampler.timesteps)
    for control in found:
        assert control.steps <= STEPS / cost.speedup(schedule) + 1e-6
        if control.timesteps is not None:
            assert control.timesteps[0] == own[0]
            assert [t for t in own if t in control.timesteps] == list(control.timesteps)
    assert {c.spacing for c in found} >= {"even", "stock leading", "stock trailing"}
    assert {c.solver for c in found} == {"DDIM", "DPM++ 2M"}


def test_all_compute_scores_as_the_full_run():
    pipe = tiny_pipe()
    result = evaluate(pipe, [schedule_for(pipe)], samples=3, batch_size=2, controls=False)
    (row,) = result["rows"]
    assert row["psnr_db"]["mean"] == metrics.PSNR_CAP_DB
    assert row["ssim"] == pytest.approx(1)
    assert row["latent_l2"] == 0
    assert row["flops_speedup"] == 1


def test_evaluation_is_paired_and_does_not_depend_on_the_batch_size():
    pipe = tiny_pipe()
    schedule = mixed_schedule(pipe)
    plain = draw(pipe, labels=(0, 1, 2, 3), seed=1_000_000)
    with sodaprof.apply(pipe, schedule):
        ours = draw(pipe, labels=(0, 1, 2, 3), seed=1_000_000)
    expected = metrics.psnr_db(ours, plain).mean()
    for batch in (1, 3, 4):
        (row,) = evaluate(pipe, [schedule], samples=4, batch_size=batch, controls=False)["rows"]
        assert row["psnr_db"]["mean"] == pytest.approx(expected, abs=0.02)
        assert row["executed"] == dict(schedule.counts())


def test_lowered_pictures_score_the_same():
    pipe = tiny_pipe()
    schedule = mixed_schedule(pipe)
    rows = [evaluate(pipe, [schedule], samples=4, batch_size=2, controls=False, runtime=r)["rows"][0] for r in RUNTIMES]
    assert rows[0]["psnr_db"] == rows[1]["psnr_db"] == rows[2]["psnr_db"]
    assert rows[3]["psnr_db"]["mean"] == pytest.approx(rows[0]["psnr_db"]["mean"], abs=0.01)
    assert rows[1]["executed"] == rows[1]["planned"]
    with pytest.raises(SodaprofError, match="hooks, lowered, captured, whole-steps"):
        evaluate(pipe, [schedule], samples=2, controls=False, runtime="quick")


def test_controls_share_the_cost_and_fora_is_not_run_twice(tmp_path):
    pipe = tiny_pipe()
    sodaprof.profile(pipe, tmp_path / "p", steps=STEPS, samples=2, max_interval=4)
    soda = sodaprof.compile_schedule(tmp_path / "p", "1.8x")
    names = [r["name"] for r in evaluate(pipe, [soda], samples=2)["rows"]]
    assert names == ["soda", "fora", "fewer steps, DDIM", "fewer steps, DPM++ 2M"]
    fora = sodaprof.compile_schedule(tmp_path / "p", soda.predicted["speedup"], policy="fora")
    result = evaluate(pipe, [soda, fora], samples=2)
    assert [r["name"] for r in result["rows"]][:2] == ["soda", "fora"]
    assert sum(r["name"] == "fora" for r in result["rows"]) == 1
    for row in result["rows"]:
        assert row["flops_speedup"] >= soda.predicted["speedup"] * 0.999


def test_calibration_seeds_are_refused():
    from dataclasses import replace

    pipe = tiny_pipe()
    schedule = replace(mixed_schedule(pipe), profile={"digest": "0", "seed": 100, "samples": 50})
    for seed, samples in ((100, 2), (149, 2), (90, 11)):
        with pytest.raises(MismatchError, match="--seed 150"):
            evaluate(pipe, [schedule], samples=samples, seed=seed)
    with pytest.raises(MismatchError, match="--seed 8"):
        evaluate(pipe, [mixed_schedule(pipe)], samples=2, seed=0)
    with pytest.raises(SodaprofError, match="at least 2"):
        evaluate(pipe, [schedule], samples=1)


def test_classifier_round_trip(tmp_path):
    torch.manual_seed(0)
    model = Classifier(("a", "b")).eval()
    model.save(tmp_path / "classifier")
    loaded = load_classifier(tmp_path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert loaded.features(x).shape == (2, 32)
    assert load_classifier(tmp_path / "nowhere") is None
    (tmp_path / "classifier" / "config.json").write_text("{}")
    with pytest.raises(SodaprofError, match="not a classifier"):
        load_classifier(tmp_path)


def test_distances_appear_with_enough_samples_and_are_explained_without(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tiny_pipe().save_pretrained(tmp_path / "m")
    Classifier(tuple("abcdefghij")).save(tmp_path / "m" / "classifier")
    pipe = sodaprof.load_pipeline(str(tmp_path / "m"), device="cpu")
    schedule = mixed_schedule(pipe)
    few = evaluate(pipe, [schedule], samples=12, controls=False)
    assert "frechet" not in few["rows"][0]
    assert any("1000 samples" in note for note in few["notes"])
    assert 0 <= few["full"]["accuracy"] <= 1
    monkeypatch.setattr("sodaprof.evaluation.LEAST_FOR_DISTANCE", 12)
    (row,) = evaluate(pipe, [schedule], samples=12, controls=False)["rows"]
    (same,) = evaluate(pipe, [schedule_for(pipe)], samples=12, controls=False)["rows"]
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert row["frechet"] > same["frechet"]
    assert np.isfinite(row["kernel"])
