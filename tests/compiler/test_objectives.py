"""Objective `distribution`: profiles of several samplers at one cost, ranked by prediction and decided by samples."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.compiler.ranking import rank_profiles
from sodaprof.errors import BudgetError, FormatError, MismatchError, SodaprofError
from sodaprof.formats.cost import cost_of
from sodaprof.formats.profile import load_profile
from sodaprof.formats.schedule import load_schedule
from sodaprof.measure.classifier import Classifier, load_classifier
from sodaprof.measure.contenders import features_of
from sodaprof.measure.data import pictures_in
from sodaprof.measure.metrics import kernel_distance
from sodaprof.pipelines.load import default_prompts, load_pipeline, set_scheduler
from sodaprof.tuning import distribution
from sodaprof.tuning.closed_loop import fit_to_model
from sodaprof.tuning.distribution import refine_distribution, sampled_by
from tests.reference.data import training_pictures
from tests.tiny_pipelines import draw, tiny_pipe
from tests.video_pipelines import tiny_video_pipe

LEAST = 12  # samples, in place of 1000
UNIPC = "UniPCMultistepScheduler"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline with a classifier of random weights."""
    folder = tmp_path_factory.mktemp("objectives") / "tiny"
    tiny_pipe().save_pretrained(folder)
    torch.manual_seed(3)
    Classifier(("a", "b"), width=4).eval().save(folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def pipe(model):
    return load_pipeline(str(model))


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Profiles under DDIM in 12 steps, UniPC in 8 and DDIM in 4."""
    root, found = tmp_path_factory.mktemp("profiles"), []
    for name, steps in (("DDIMScheduler", 12), (UNIPC, 8), ("DDIMScheduler", 4)):
        own = load_pipeline(str(model), scheduler=name)
        found.append(root / f"{name}-{steps}")
        sodaprof.profile(own, found[-1], name="tiny", steps=steps, samples=4, max_interval=3, states_only=True)
    return found


@pytest.fixture(scope="module")
def data(pipe, tmp_path_factory):
    """Pictures of the pipeline's own, in 12 steps, of seeds that nothing else draws."""
    folder = tmp_path_factory.mktemp("data")
    pictures = np.concatenate([draw(pipe, range(10), 12, seed=seed) for seed in (900, 950)])
    for number, picture in enumerate(pictures):
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(distribution, "LEAST_FOR_DISTANCE", LEAST)


def test_all_profiles_are_compiled_for_one_cost(folders):
    ranked, left_out = rank_profiles(folders, "3x")
    assert not left_out
    assert [one.error for one in ranked] == sorted(one.error for one in ranked)
    by_name = {one.name: one for one in ranked}
    first = load_profile(folders[0])
    table = cost_of(first.folder, "flops")
    allowed = table.all_compute(by_name[str(folders[0])].schedule) / 3
    for one in ranked:
        spent = cost_of(one.profile.folder, "flops").schedule(one.schedule)
        assert spent <= allowed * (1 + 1e-9)
        whole = len(one.schedule.anchors()) == one.schedule.steps
        assert whole or spent + table.transformers["transformer"].full > allowed  # no room for another full step
        assert one.speedup == pytest.approx(allowed * 3 / spent)
    ddim, unipc, short = (by_name[str(folder)].schedule for folder in folders)
    assert (unipc.sampler.class_name, unipc.steps) == (UNIPC, 8)
    assert len(ddim.anchors()) == len(unipc.anchors()) == len(short.anchors()) == 4
    assert ddim.policy["knobs"]["predicted_errors"] == {one.name: one.error for one in ranked}
    assert ddim.policy["knobs"]["budget"] == 3


def test_a_profile_whose_full_loop_costs_less_is_taken_whole(folders):
    ranked, _ = rank_profiles(folders, 1.5)
    errors = {one.name: one.error for one in ranked}
    whole = next(one for one in ranked if one.name == str(folders[2]))
    assert len(whole.schedule.anchors()) == 4
    assert whole.error < 0.1 * errors[str(folders[0])]  # it is its own full run: nothing about how good that is
    assert ranked[-1].name == str(folders[0])


def test_what_cannot_be_compiled_is_left_out_or_refused(folders, pipe, tmp_path):
    ranked, left_out = rank_profiles(folders, 3, knobs={"anchors": 3})
    assert len(ranked) == 3
    ranked, left_out = rank_profiles(folders, 2, knobs={"anchors": 5})
    assert list(left_out) == [str(folders[2])]
    assert "do not fit" in left_out[str(folders[2])]
    with pytest.raises(BudgetError, match="No profile can be compiled at this cost"):
        rank_profiles(folders, 1000)
    with pytest.raises(BudgetError, match="--max-cache"):
        rank_profiles(folders, 2, max_cache=1)
    for wrong in (folders[:1], [folders[0], folders[0]]):
        with pytest.raises(SodaprofError, match="ranks several profiles"):
            rank_profiles(wrong, 2)
    deeper = tmp_path / "deeper"
    sodaprof.profile(tiny_pipe(layers=3), deeper, name="deeper", steps=8, samples=1, max_interval=3, states_only=True)
    with pytest.raises(MismatchError, match="deeper is of deeper"):
        rank_profiles([*folders, deeper], 2)


def test_the_nearest_samples_decide(model, pipe, folders, data, few):
    own = pipe.scheduler
    best, judged, left_out = refine_distribution(pipe, folders, 3, samples=LEAST, data=data, batch_size=5)
    assert not left_out
    assert pipe.scheduler is own
    assert len(judged) == 3
    assert [one.kernel for one in judged] == sorted(one.kernel for one in judged)
    assert best.transformers == judged[0].schedule.transformers
    assert best.sampler == judged[0].schedule.sampler
    assert best.update.fitted["loop"] == "closed"
    knobs = best.policy["knobs"]
    assert knobs["kernel_distances"] == {one.ranked.name: one.kernel for one in judged}
    assert (knobs["samples"], knobs["samples_seed"]) == (LEAST, distribution.SEED)
    classifier = load_classifier(model)
    real = features_of(classifier, pictures_in(data, 1)).double().numpy()
    labels = [default_prompts(pipe)[i % 10] for i in range(LEAST)]
    for one in judged:  # the same by hand, under the scheduler that such a schedule can also be run as
        pipe.scheduler = sodaprof.scheduler(one.schedule)
        pictures = draw(pipe, labels, len(one.schedule.anchors()), seed=distribution.SEED)
        pipe.scheduler = own
        features = features_of(classifier, pictures).double().numpy()
        assert kernel_distance(features, real) == pytest.approx(one.kernel, rel=1e-3, abs=1e-7)
        if one.over_best is not None:
            assert one.over_best["mean"] == pytest.approx(one.kernel - judged[0].kernel, abs=1e-9)
            assert one.over_best["low"] < one.over_best["mean"] < one.over_best["high"]


def test_what_is_missing_is_named_once(pipe, folders, data, few, tmp_path):
    with pytest.raises(SodaprofError, match=r"missing: pictures of what it was trained on \(--data FOLDER\)\. Without"):
        refine_distribution(pipe, folders, 3, samples=LEAST)
    with pytest.raises(SodaprofError, match=r"missing: a classifier .* and pictures of what it was trained on"):
        refine_distribution(tiny_pipe(), folders, 3, samples=LEAST)
    with pytest.raises(SodaprofError, match=f"--samples is 3; distances need at least {LEAST}"):
        refine_distribution(pipe, folders, 3, samples=3, data=data)
    with pytest.raises(MismatchError, match="Seeds 2…13 touch those of"):
        refine_distribution(pipe, folders, 3, samples=LEAST, data=data, seed=2)
    with pytest.raises(FormatError, match="0 pictures"):
        refine_distribution(pipe, folders, 3, samples=LEAST, data=tmp_path)
    for number in range(LEAST):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    with pytest.raises(MismatchError, match=r"The data is of shape \(9, 9, 3\), the pipeline makes \(8, 8, 3\)"):
        refine_distribution(pipe, folders, 3, samples=LEAST, data=tmp_path)
    Image.new("RGB", (8, 9)).save(tmp_path / "z.png")
    with pytest.raises(FormatError, match=r"z\.png: .* Give one size"):
        pictures_in(tmp_path, 1)


def test_drawings_of_the_shipped_models():
    pictures = training_pictures("tiny-dit", 12, 5)
    assert pictures.shape == (12, 32, 32, 3)
    assert 0 <= pictures.min() < 0.2 < 0.8 < pictures.max() <= 1
    assert np.array_equal(pictures, training_pictures("tiny-dit", 12, 5))
    assert not np.array_equal(pictures, training_pictures("tiny-dit", 12, 6))
    assert training_pictures("tiny-pixart", 3, 5).shape == (3, 32, 32, 3)
    with pytest.raises(SodaprofError, match="No data is known for tiny-opensora"):
        training_pictures("tiny-opensora", 3, 5)


def test_another_scheduler_of_diffusers(pipe, folders):
    sampler = load_profile(folders[1]).sampler
    own = pipe.scheduler
    with sampled_by(pipe, sampler):
        assert type(pipe.scheduler).__name__ == UNIPC
        assert pipe.scheduler.config.beta_schedule == own.config.beta_schedule
        profile = load_profile(folders[0])
        schedule = compile_schedule(folders[0], 3)
        with pytest.raises(MismatchError, match="is for DDIMScheduler, the pipeline has UniPC"):
            fit_to_model(pipe, profile, schedule, cost_of(folders[0], "flops"), samples=2)
    assert pipe.scheduler is own
    with pytest.raises(SodaprofError, match="DiTPipeline: no scheduler of diffusers"):
        set_scheduler(tiny_pipe(), "DiTPipeline")
    with pytest.raises(SodaprofError, match="samples a flow; the pipeline has DDIMScheduler"):
        set_scheduler(tiny_pipe(), "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(SodaprofError, match="samples a discrete diffusion; the pipeline has"):
        set_scheduler(tiny_video_pipe(), "DDIMScheduler")


# ---- the command line -------------------------------------------------------------------------------------------------


def test_compile_ranks_and_says_what_the_ranking_is_not(command, folders, tmp_path):
    code, out, _ = command(
        "compile", *folders, "--objective", "distribution", "--budget", "3x", "-o", tmp_path / "s.json"
    )
    assert code == 0
    assert "against the profile's own full run" in out
    assert "refine --objective distribution MODEL" in out
    ranked, _ = rank_profiles(folders, 3)
    assert load_schedule(tmp_path / "s.json").digest() == ranked[0].schedule.digest()
    assert len(re.findall(r"^ \S*Scheduler-\d+ ", out, re.MULTILINE)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--objective distribution"),
        (("--objective", "nearest"), "expected faithful or distribution"),
        (("--objective", "distribution", "--policy", "soda"), "Leave --policy"),
        (("--objective", "distribution", "--fit", "m"), "refine --objective distribution"),
    ],
)
def test_several_profiles_without_sense(command, folders, tmp_path, arguments, message):
    code, _, err = command("compile", *folders, *arguments, "-o", tmp_path / "s.json")
    assert code == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_from_other_samplers_to_a_picture(command, model, data, tmp_path, few, monkeypatch):
    monkeypatch.setattr("sodaprof.measure.metrics.LEAST_FOR_DISTANCE", LEAST)
    profiles = tmp_path / "ddim", tmp_path / "unipc"
    for folder, more in zip(profiles, ((), ("--scheduler", UNIPC)), strict=True):
        made = ("--steps", 8, "--samples", 2, "--max-interval", 3)
        assert command("profile", model, "-o", folder, *made, *more)[0] == 0
    assert load_profile(profiles[1]).sampler.class_name == UNIPC
    best = tmp_path / "best.json"
    code, out, _ = command(
        "refine", model, *profiles, "--objective", "distribution", "--budget", "2x", "--data", data, "-o", best
    )
    assert code == 0
    assert "nearest to the data" in out
    chosen = load_schedule(best).sampler.class_name
    assert f"--scheduler {chosen}" in out
    picture = tmp_path / "p.png"
    assert command("run", model, best, "--scheduler", chosen, "--label", 3, "-o", picture)[0] == 0
    code, out, _ = command("eval", model, best, "--scheduler", chosen, "--samples", 2, "--no-controls")
    assert code == 0
    other = UNIPC if chosen != UNIPC else "DDIMScheduler"
    code, _, err = command("run", model, best, "--scheduler", other, "--label", 3, "-o", tmp_path / "q.png")
    assert code == 1
    assert f"is for {chosen}" in err
    code, out, _ = command(  # what a profile was sampled by is what it is fitted by
        "compile", profiles[1], "--policy", "mix", "--fit", model, "--budget", "1.5x", "-o", tmp_path / "mix.json"
    )
    assert code == 0
    assert f"Sampled by {UNIPC}" in out
    assert "Taken: " in out
    code, _, err = command("compile", profiles[1], "--policy", "mix", "-o", tmp_path / "no.json")
    assert code == 1
    assert "--fit MODEL" in err
    code, _, err = command(
        "compile", profiles[0], "--policy", "mix", "--fit", model, "--update", "-o", tmp_path / "no.json"
    )
    assert code == 1
    assert "Leave --knob and --update out" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "2x"), "are for --objective distribution"),
        ((), "a search begins with one schedule"),
        (("--objective", "distribution", "--time", "5m"), "Leave --time"),
    ],
)
def test_refine_without_sense(command, folders, tmp_path, arguments, message):
    code, _, err = command("refine", "tiny", *folders, *arguments, "-o", tmp_path / "s.json")
    assert code == 1
    assert message in err
