"""Metrics by hand, and the evaluation's fairness: controls, seeds, pairing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from scipy.stats import norm

import sodaprof
from sodaprof.errors import MismatchError, SodaprofError
from sodaprof.measure import metrics
from sodaprof.measure.classifier import Classifier, load_classifier
from sodaprof.measure.contenders import features_of
from sodaprof.measure.evaluate import evaluate
from sodaprof.pipelines.load import REFERENCE
from sodaprof.runtime.apply import RUNTIMES
from tests.reference import drawings
from tests.tiny_pipelines import SITES, STEPS, draw, mixed_schedule, schedule_for, tiny_pipe


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def profile(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "profile"
    sodaprof.profile(pipe, folder, steps=STEPS, samples=2, max_interval=4)
    return folder


def test_psnr_by_hand():
    a = np.full((3, 8, 8, 3), 0.5)
    b = a + np.array([0.0, 0.1, -0.01])[:, None, None, None]
    np.testing.assert_allclose(metrics.psnr_db(a, b), [metrics.PSNR_CAP_DB, 20.0, 40.0])
    with pytest.raises(TypeError, match="wrap"):
        metrics.psnr_db(a.astype(np.uint8), a.astype(np.uint8))


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


def test_the_interval_of_a_kernel_difference_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered, data = 0, rng.standard_normal((100, 3))
    many = rng.standard_normal((2000, 3))
    truth = metrics.kernel_distance(many + 0.3, data) - metrics.kernel_distance(many, data)
    for _ in range(60):
        a = rng.standard_normal((100, 3))
        found = metrics.kernel_difference(a + 0.3, a, data)
        difference = metrics.kernel_distance(a + 0.3, data) - metrics.kernel_distance(a, data)
        assert found["mean"] == pytest.approx(difference)
        covered += found["low"] < truth < found["high"]
    assert 50 <= covered <= 60
    same = metrics.kernel_difference(a, a, data)
    assert (same["low"], same["mean"], same["high"]) == (0, 0, 0)


def test_interval_is_that_of_the_mean():
    values = norm.ppf((np.arange(400) + 0.5) / 400) + 5
    found = metrics.mean_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found["mean"] == pytest.approx(5)
    assert found["low"] == pytest.approx(5 - half, abs=0.02)
    assert found["high"] == pytest.approx(5 + half, abs=0.02)


def test_the_worst_decile_is_compared_seed_by_seed():
    assert metrics.worst_decile(np.arange(40.0)) == 1.5
    assert metrics.worst_decile(np.array([3.0, 1.0])) == 1.0
    rng = np.random.default_rng(0)
    values = rng.standard_normal(100) * 5 + 40
    same = metrics.worst_decile_difference(values + 2, values)
    assert same == pytest.approx({"mean": 2, "low": 2, "high": 2})
    other = metrics.worst_decile_difference(rng.permutation(values) + 2, values)
    assert other["mean"] == pytest.approx(2)
    assert other["low"] < 1 < 3 < other["high"]


def test_a_flipped_picture_is_under_20_db():
    assert metrics.flipped(np.array([19.9, 20.0, 55.0, 3.0])) == 0.5


def test_all_compute_scores_as_the_full_run(pipe):
    result = evaluate(pipe, [schedule_for(pipe)], samples=3, batch_size=2, controls=False)
    (row,) = result["rows"]
    assert row["psnr_db"]["mean"] == metrics.PSNR_CAP_DB
    assert row["ssim"] == pytest.approx(1)
    assert row["latent_l2"] == 0
    assert row["flops_speedup"] == 1


def test_evaluation_is_paired_and_does_not_depend_on_the_batch_size(pipe):
    schedule = mixed_schedule(pipe)
    plain = draw(pipe, labels=(0, 1, 2, 3), seed=1_000_000)
    with sodaprof.apply(pipe, schedule):
        ours = draw(pipe, labels=(0, 1, 2, 3), seed=1_000_000)
    expected = metrics.psnr_db(ours, plain).mean()
    for batch in (1, 3):  # the pictures above are one batch
        (row,) = evaluate(pipe, [schedule], samples=4, batch_size=batch, controls=False)["rows"]
        assert row["psnr_db"]["mean"] == pytest.approx(expected, abs=0.02)
        assert row["executed"] == dict(schedule.counts())


def test_compiled_pictures_score_the_same(pipe):
    schedule = schedule_for(pipe, dict.fromkeys(SITES, "CRCR"), steps=4)
    settings = {"samples": 2, "batch_size": 1, "controls": False}
    results = [evaluate(pipe, [schedule], **settings, runtime=name) for name in RUNTIMES]
    results.append(evaluate(pipe, [schedule], **settings, runtime="compiled", graphs=False))
    assert [result["runtime"] for result in results] == ["hooks", "compiled", "whole-steps", "compiled"]
    hooks, compiled, whole_steps, without_graphs = (result["rows"][0] for result in results)
    assert hooks["psnr_db"] == compiled["psnr_db"] == without_graphs["psnr_db"]
    assert whole_steps["psnr_db"]["mean"] == pytest.approx(hooks["psnr_db"]["mean"], abs=0.01)
    assert compiled["executed"] == compiled["planned"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "quick"}, "No runtime 'quick'; there are hooks, compiled, whole-steps"),
        ({"runtime": "lowered"}, "another name now: --runtime compiled --no-graphs"),
        ({"runtime": "captured"}, "another name now: --runtime compiled$"),
        ({"runtime": "whole-steps", "graphs": False}, "whole-steps needs graphs. Leave --no-graphs out"),
    ],
)
def test_other_runtimes_are_refused(pipe, settings, message):
    with pytest.raises(SodaprofError, match=message):
        evaluate(pipe, [mixed_schedule(pipe)], samples=2, **settings)


def test_a_decoder_that_the_user_replaced_is_kept(pipe, monkeypatch):
    decode = type(pipe.vae).decode.__get__(pipe.vae)
    monkeypatch.setitem(vars(pipe.vae), "decode", decode)
    evaluate(pipe, [schedule_for(pipe, steps=4)], samples=2, controls=False)
    assert vars(pipe.vae)["decode"] is decode


def test_controls_share_the_cost_and_fora_is_not_run_twice(pipe, profile):
    soda = sodaprof.compile_schedule(profile, "1.8x", policy="soda")
    names = [r["name"] for r in evaluate(pipe, [soda], samples=2)["rows"]]
    assert names == ["soda", "fora", "fewer steps, DDIM", "fewer steps, DPM++ 2M", "fewer steps, UniPC"]
    fora = sodaprof.compile_schedule(profile, soda.predicted["speedup"], policy="fora")
    result = evaluate(pipe, [soda, fora], samples=2)
    assert [r["name"] for r in result["rows"]][:2] == ["soda", "fora"]
    assert sum(r["name"] == "fora" for r in result["rows"]) == 1
    for row in result["rows"]:
        assert row["flops_speedup"] >= soda.predicted["speedup"] * 0.999


def test_calibration_seeds_are_refused(pipe):
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
    assert "distance" not in few["rows"][0]
    assert any("1000 samples" in note for note in few["notes"])
    assert 0 <= few["full"]["accuracy"] <= 1
    monkeypatch.setattr(metrics, "LEAST_FOR_DISTANCE", 12)
    data = np.random.default_rng(0).random((20, 8, 8, 3))
    found = evaluate(pipe, [schedule], samples=12, controls=False, data=data)
    (row,) = found["rows"]
    (same,) = evaluate(pipe, [schedule_for(pipe)], samples=12, controls=False)["rows"]
    assert same["distance"]["full"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert row["distance"]["full"]["frechet"] > same["distance"]["full"]["frechet"]
    assert np.isfinite(row["distance"]["full"]["kernel"])
    assert set(same["distance"]) == {"full"}
    assert set(row["distance"]) == {"full", "data"}
    assert set(found["full"]["distance"]) == {"data"}
    over = row["distance"]["data"]["kernel_over_full"]
    apart = row["distance"]["data"]["kernel"] - found["full"]["distance"]["data"]["kernel"]
    assert over["mean"] == pytest.approx(apart)
    assert over["low"] < apart < over["high"]
    for values in (row, found["full"]):  # noise is far from what an untrained network draws
        assert values["distance"]["data"]["frechet"] > 2 * row["distance"]["full"]["frechet"]
    for wrong, message in (
        ({"data": data[:11]}, "11 pictures of data; distances need at least 12"),
        ({"samples": 11}, "--samples is 11; distances to data need at least 12. Type: --samples 12"),
        ({"data": data[:, 1:]}, r"The data is of shape \(7, 8, 3\), the pipeline makes \(8, 8, 3\)"),
    ):
        with pytest.raises(SodaprofError, match=message):
            evaluate(pipe, [schedule], **{"samples": 12, "data": data} | wrong, controls=False)
    with pytest.raises(SodaprofError, match="No classifier"):
        evaluate(tiny_pipe(), [schedule], samples=12, controls=False, data=data)


def test_two_draws_of_the_data_are_near_and_a_draw_of_half_the_classes_is_far():
    """Distances of drawings in the features of tiny-dit's classifier."""
    classifier = load_classifier(REFERENCE / "tiny-dit")
    labels = torch.arange(1000) % 10

    def features(labels, seed):
        drawn = drawings.draw(labels, torch.Generator().manual_seed(seed))
        return features_of(classifier, (drawn.permute(0, 2, 3, 1).numpy() + 1) / 2).double().numpy()

    one, other, half = features(labels, 0), features(labels, 1), features(labels % 5, 2)
    near = metrics.kernel_distance(one, other), metrics.frechet_distance(one, other)
    far = metrics.kernel_distance(one, half), metrics.frechet_distance(one, half)
    assert abs(near[0]) < 0.05 * far[0]
    assert near[1] < 0.05 * far[1]


def test_every_row_is_compared_with_the_references_of_nearest_cost(pipe, profile):
    policies = (("soda", 1.6), ("soda", 2.4), ("fora", 1.6))
    schedules = [sodaprof.compile_schedule(profile, budget, policy=policy) for policy, budget in policies]
    result = evaluate(pipe, schedules, samples=3, budget=1.6, controls=["fewer steps, DDIM"])
    rows = result["rows"]
    assert [row["name"] for row in rows] == ["soda", "soda", "fora", "fewer steps, DDIM"]
    assert [sorted(row["over"]) for row in rows] == [["fora"], ["fora"], ["soda"], ["fora", "soda"]]
    assert rows[2]["over"]["soda"]["mean"] == pytest.approx(-rows[0]["over"]["fora"]["mean"])
    tried = {one["detail"] for one in result["candidates"]}
    assert "5 steps, even" in tried  # of 8 at 1.6x, whatever the schedules reach
    assert {int(detail.split()[0]) for detail in tried if "anchors" not in detail} == {5}
    last = rows[3]
    assert last["over"]["soda"]["mean"] == pytest.approx(last["psnr_db"]["mean"] - rows[0]["psnr_db"]["mean"])
    assert last["over"]["soda"]["low"] <= last["over"]["soda"]["mean"] <= last["over"]["soda"]["high"]


def test_what_replaces_computation_is_read_off_the_schedule(pipe):
    schedules = [mixed_schedule(pipe), schedule_for(pipe)]
    rows = evaluate(pipe, schedules, samples=2, controls=["fewer steps, UniPC"])["rows"]
    assert [row["works_by"] for row in rows[:2]] == [["reuse", "forecast", "pruning"], []]
    assert {tuple(row["works_by"]) for row in rows[2:]} == {("fewer steps",)}
