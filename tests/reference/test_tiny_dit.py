"""What ships: the reference model, its classifier, its profile and its schedules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sodaprof
from sodaprof.measure.classifier import load_classifier
from sodaprof.pipelines.entries import read_prompts
from sodaprof.pipelines.load import REFERENCE, call, load_pipeline, pictures_of, reference_models
from tests.reference.drawings import CLASSES, draw

MODEL = REFERENCE / "tiny-dit"
SHIPPED = Path(__file__).parents[2] / "schedules" / "tiny-dit"
SCHEDULES = sorted(SHIPPED.glob("*.json"))


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("tiny-dit", device="cpu")


def size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_it_ships_small_and_in_bfloat16():
    assert "tiny-dit" in reference_models()
    weights = MODEL / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert size(MODEL / "classifier") <= 1_000_000
    assert size(MODEL) <= 12_000_000
    assert {t.dtype for t in load_file(weights).values()} == {torch.bfloat16}


def test_it_is_a_real_dit_pipeline(pipe):
    config = pipe.transformer.config
    assert config.num_layers >= 8
    assert (config.sample_size // config.patch_size) ** 2 >= 64
    assert config.norm_type == "ada_norm_zero"
    assert config.num_embeds_ada_norm == 1000
    assert not pipe.scheduler.config.clip_sample
    assert [pipe.labels[c] for c in CLASSES] == list(range(10))


def test_drawings_are_repeatable_and_varied():
    labels = torch.arange(10).repeat(2)
    a, b = (draw(labels, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (20, 3, 32, 32)
    assert a.abs().max() <= 1 + 1e-6
    assert all((a[i] - a[i + 10]).abs().mean() > 0.05 for i in range(10))


def test_the_classifier_knows_held_out_drawings():
    labels = torch.arange(10).repeat(100)
    pictures = draw(labels, torch.Generator().manual_seed(77_777))
    with torch.no_grad():
        guess = load_classifier(MODEL)(pictures).argmax(1)
    assert (guess == labels).float().mean() >= 0.98


def test_the_classifier_knows_the_models_samples(pipe):
    labels = list(range(10)) * 2
    pictures = pictures_of(call(pipe, labels, range(3_000_000, 3_000_020), 20))
    with torch.no_grad():
        guess = load_classifier(MODEL)(torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1).argmax(1)
    assert (guess == torch.tensor(labels)).float().mean() >= 0.85  # the card's figure comes from 500


def test_the_committed_profile_is_small_and_whole():
    assert size(SHIPPED / "profile") <= 4 * 2**20
    profile = sodaprof.load_profile(SHIPPED / "profile")
    errors = profile.caching_error()["transformer"]
    assert errors.shape == (50, 16, 8)
    assert np.nanmin(errors) >= 0
    one, seven = errors[7:, :, 1], errors[7:, :, 7]
    assert (seven > one).mean() > 0.99  # older is worse


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda p: p.stem)
def test_a_committed_schedule_is_what_the_compiler_makes_of_the_committed_profile(path):
    schedule = sodaprof.load_schedule(path)
    knobs, policy, budget = schedule.policy["knobs"], schedule.policy["name"], path.stem.rsplit("-", 1)[1]
    again = sodaprof.compile_schedule(SHIPPED / "profile", budget, policy)
    assert again.counts() == schedule.counts()
    assert again.transformers == schedule.transformers or policy == "solver"  # the fit chooses among placements
    assert again.profile == schedule.profile
    assert again.policy["knobs"] == knobs
    assert schedule.predicted["speedup"] >= float(budget.removesuffix("x"))
    if policy == "solver":
        assert schedule.update.fitted["loop"] in ("open", "closed")
        assert len(schedule.anchors()) == knobs["anchors"]
    else:
        assert schedule.update is None


def test_there_are_schedules():
    policies, budgets = ("solver", "soda", "fora"), ("2.0x", "2.5x", "3.5x", "5.0x")
    assert {p.stem for p in SCHEDULES} == {f"{policy}-{budget}" for policy in policies for budget in budgets}


def test_a_committed_schedule_runs_as_planned(pipe):
    with sodaprof.apply(pipe, SHIPPED / "soda-2.0x.json") as handle:
        call(pipe, [5], [3_000_000], 50)
        assert handle.report().complete
        assert handle.report().executed == handle.report().planned


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [("tiny-dit", 10, int), ("imagenet-labels", 100, int), ("text-to-image", 100, str), ("text-to-video", 10, str)],
)
def test_calibration_prompts(name, count, kind):
    entries = read_prompts(name)
    assert len(entries) == len(set(entries)) == count
    assert {type(e) for e in entries} == {kind}
