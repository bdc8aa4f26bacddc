"""A model profiled, compiled and run with another scheduler of diffusers than the pipeline's own."""

from __future__ import annotations

import pytest

from sodaprof.compiler import compile_schedule
from sodaprof.errors import MismatchError, SodaprofError
from sodaprof.formats.cost import cost_of
from sodaprof.formats.profile import load_profile
from sodaprof.pipelines.load import load_pipeline, set_scheduler
from sodaprof.tuning.closed_loop import fit_to_model
from tests.tiny_pipelines import tiny_pipe
from tests.video_pipelines import tiny_video_pipe

UNIPC = "UniPCMultistepScheduler"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samplers") / "tiny"
    tiny_pipe().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(command, model, tmp_path):
    """A profile of 8 steps of UniPC."""
    made = ("--steps", 8, "--samples", 2, "--max-interval", 3)
    assert command("profile", model, "-o", tmp_path / "unipc", *made, "--scheduler", UNIPC)[0] == 0
    return tmp_path / "unipc"


def test_from_another_sampler_to_a_picture(command, model, folder, tmp_path):
    assert load_profile(folder).sampler.class_name == UNIPC
    best = tmp_path / "best.json"
    assert command("compile", folder, "--budget", "2x", "-o", best)[0] == 0
    picture = tmp_path / "p.png"
    assert command("run", model, best, "--scheduler", UNIPC, "--label", 3, "-o", picture)[0] == 0
    assert command("eval", model, best, "--scheduler", UNIPC, "--samples", 2, "--no-controls")[0] == 0
    code, _, err = command("run", model, best, "--label", 3, "-o", tmp_path / "q.png")
    assert code == 1
    assert f"is for {UNIPC}" in err
    code, out, _ = command(  # a closed-loop fit samples as the profile was sampled
        "compile", folder, "--policy", "mix", "--fit", model, "--budget", "1.5x", "-o", tmp_path / "mix.json"
    )
    assert code == 0
    assert f"Sampled by {UNIPC}" in out
    assert "Taken: " in out


@pytest.mark.parametrize(
    ("more", "message"), [((), "--fit MODEL"), (("--fit", "no-such-model", "--update"), "--update out")]
)
def test_mix_refuses_in_one_message(command, folder, tmp_path, more, message):
    code, _, err = command("compile", folder, "--policy", "mix", *more, "-o", tmp_path / "no.json")
    assert code == 1
    assert message in err


def test_a_fit_refuses_another_scheduler(model, folder):
    profile, schedule = load_profile(folder), compile_schedule(folder, 2)
    with pytest.raises(MismatchError, match=f"is for {UNIPC}, the pipeline has DDIM"):
        fit_to_model(load_pipeline(str(model)), profile, schedule, cost_of(folder, "flops"), samples=2)


def test_schedulers_that_cannot_take_the_place():
    with pytest.raises(SodaprofError, match="DiTPipeline: not a scheduler of diffusers"):
        set_scheduler(tiny_pipe(), "DiTPipeline")
    with pytest.raises(SodaprofError, match="samples a flow; the pipeline has DDIMScheduler"):
        set_scheduler(tiny_pipe(), "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(SodaprofError, match="samples a discrete diffusion; the pipeline has"):
        set_scheduler(tiny_video_pipe(), "DDIMScheduler")
