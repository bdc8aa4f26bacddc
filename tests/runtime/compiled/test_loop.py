"""The whole-step loop: the pictures of the pipeline from graphs with guidance and solver inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

import sodaprof
from sodaprof.errors import UnsupportedModelError
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.pipelines.guidance import guidance_of
from sodaprof.runtime.compiled.engine import Compiled
from tests.tape import Tapes
from tests.tiny_pipelines import (
    FEW,
    TwoPassPipeline,
    few,
    few_schedule,
    schedule_for,
    tiny_pipe,
    with_known_programs,
)


def looped(pipe, schedule, recorder):
    return with_known_programs(sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=recorder, whole_steps=True)))


def set_scheduler(pipe, name):
    config = dict(pipe.scheduler.config)
    if name == "dpm":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    elif name == "ddpm":
        pipe.scheduler = DDPMScheduler.from_config(config, clip_sample=False)
    elif name == "flow":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif name == "rectified":
        pipe.scheduler = RectifiedFlowScheduler(use_timestep_transform=False)


def sample(pipe, *args, **kwargs):
    torch.manual_seed(11)  # DDPM draws from it: these pipelines hand their generator to nobody
    return few(pipe, *args, **kwargs)


BOTH = [(cls, s) for cls in (DiTPipeline, TwoPassPipeline) for s in ("ddim", "dpm", "ddpm")]


@pytest.mark.parametrize(("cls", "scheduler"), [*BOTH, (TwoPassPipeline, "flow"), (TwoPassPipeline, "rectified")])
def test_pictures_equal_those_of_the_pipeline(cls, scheduler):
    pipe, tapes = tiny_pipe(cls=cls), Tapes()
    set_scheduler(pipe, scheduler)
    schedule, plain = few_schedule(pipe), sample(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted, others = sample(pipe), sample(pipe, (7, 3), seed=5)
        weaker = sample(pipe, guidance_scale=1.5)
    with looped(pipe, schedule, tapes) as handle:
        for _ in range(4):
            assert np.allclose(sample(pipe), wanted, atol=2e-5)
            assert handle.report().executed == handle.report().planned
        assert np.allclose(sample(pipe, (7, 3), seed=5), others, atol=2e-5)
        graphs = FEW - 1 + (2 if cls is TwoPassPipeline else 1)  # of whole steps, and one for each branch of the first
        assert handle.report().path == f"compiled: {graphs} graphs, {FEW}/{FEW} steps replayed, whole steps"
        assert np.allclose(sample(pipe, guidance_scale=1.5), weaker, atol=2e-5)
        assert np.allclose(sample(pipe), wanted, atol=2e-5)
        assert tapes.played > 3 * FEW
    assert np.array_equal(sample(pipe), plain)  # after removal


def test_without_a_gpu_the_loop_runs_without_graphs():
    pipe = tiny_pipe()
    schedule = schedule_for(pipe, steps=FEW)
    wanted = few(pipe)
    with looped(pipe, schedule, True) as handle:
        for _ in range(3):
            assert np.allclose(few(pipe), wanted, atol=2e-5)
        assert handle.report().path.startswith("compiled, no CUDA graphs: CUDA graphs need a GPU")
    assert np.array_equal(few(pipe), wanted)


def test_a_run_after_an_aborted_one_gives_the_same_pictures():
    pipe = tiny_pipe()
    schedule = few_schedule(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = few(pipe)
    with looped(pipe, schedule, Tapes()):
        few(pipe), few(pipe), few(pipe)
        step = pipe.scheduler.step

        def fails(*args, **kwargs):
            raise KeyboardInterrupt

        pipe.scheduler.step = fails
        with pytest.raises(KeyboardInterrupt):
            few(pipe)
        pipe.scheduler.step = step
        assert np.allclose(few(pipe), wanted, atol=2e-5)


def test_a_pipeline_that_changes_latents_between_steps_runs_its_own_steps():
    class Scaled(TwoPassPipeline):
        pass

    pipe = tiny_pipe(cls=Scaled)
    schedule = few_schedule(pipe)
    scaled = lambda m, args, kwargs: ((args[0] * 1.01, *args[1:]), kwargs)  # noqa: E731
    hook = pipe.transformer.register_forward_pre_hook(scaled, with_kwargs=True)
    with sodaprof.apply(pipe, schedule):
        wanted = few(pipe)
    with looped(pipe, schedule, Tapes()) as handle:
        for _ in range(3):
            assert np.array_equal(few(pipe), wanted)
        assert "more to the latents" in handle.report().path
    hook.remove()


def test_guidance_is_found_from_a_step():
    one, other = torch.randn(2, 2, 8, 4, 4)
    guided = other[:, :4] + 4.0 * (one[:, :4] - other[:, :4])
    assert guidance_of(guided, [torch.cat([one, other])], "halves") == ([4.0, -3.0], False)
    assert guidance_of(torch.cat([guided, guided]), [torch.cat([one, other])], "halves") == ([4.0, -3.0], True)
    assert guidance_of(guided, [other, one], "passes") == ([-3.0, 4.0], False)
    assert guidance_of(one, [one], "none") == ([1.0], False)
    with pytest.raises(
        UnsupportedModelError, match=r"is no weighted sum .*; expected plain guidance: switch its rescaling off.*--fit"
    ):
        guidance_of(guided * guided.std(), [one, other], "passes")
    with pytest.raises(UnsupportedModelError, match="on 3 branches; expected one or two: switch other guidance off"):
        guidance_of(guided, [one, other, one], "passes")
    with pytest.raises(
        UnsupportedModelError, match=r"receives \[1, 4, 4, 4\], .* returns \[2, 8, 4, 4\]; expected .*: call"
    ):
        guidance_of(guided[:1], [one, other], "passes")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("apart", [1.0, 0.1, 0.01])
def test_guidance_is_found_from_a_step_of_rounded_numbers(dtype, apart):
    generator = torch.Generator().manual_seed(0)
    other, step = torch.randn(2, 2, 4, 16, 16, generator=generator)
    one, other = (other + apart * step).to(dtype), other.to(dtype)
    guided = other + 4.0 * (one - other)
    assert guidance_of(guided, [one, other], "passes", 4.0) == ([4.0, -3.0], False)
    assert guidance_of(guided, [other, one], "passes", 4.0) == ([-3.0, 4.0], False)
    assert guidance_of(guided, [other, one], "passes")[0] == pytest.approx([-3.0, 4.0], abs=0.05)
    weaker = other + 1.5 * (one - other)  # the pipeline is called with another scale than the schedule's
    assert guidance_of(weaker, [one, other], "passes", 4.0)[0] == pytest.approx([1.5, -0.5], abs=0.05)
    for wrong in (0.95 * guided, guided + 0.02 * guided.std()):
        with pytest.raises(UnsupportedModelError, match="is no weighted sum"):
            guidance_of(wrong, [one, other], "passes", 4.0)


@pytest.mark.parametrize("cls", [DiTPipeline, TwoPassPipeline])
def test_runs_in_bf16_share_their_graphs(cls):
    pipe, tapes = tiny_pipe(cls=cls).to(torch.bfloat16), Tapes()
    with looped(pipe, few_schedule(pipe), tapes) as handle:
        few(pipe), few(pipe), few(pipe)
        made = tapes.made
        for seed in (5, 6, 7):
            few(pipe, (7, 3), seed=seed)
            assert handle.report().path.endswith("whole steps")
        assert tapes.made == made


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("cls", [DiTPipeline, TwoPassPipeline])
def test_a_pipeline_that_iterates_over_the_timesteps_iterates_twice(cls, listed):
    pipe, calls = tiny_pipe(cls=cls), []
    schedule, branches = few_schedule(pipe), 2 if cls is TwoPassPipeline else 1
    if listed:
        pipe.progress_bar = list  # DiT's pipeline then iterates over a list of its own
    with sodaprof.apply(pipe, schedule):
        wanted = few(pipe)
    with looped(pipe, schedule, Tapes()) as handle:
        few(pipe), few(pipe)
        pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        for _ in range(3):
            calls.clear()
            assert np.allclose(few(pipe), wanted, atol=2e-5)
            assert len(calls) == branches * (FEW if listed and cls is DiTPipeline else 2)
            report = handle.report()
            assert report.complete
            assert report.executed == report.planned
        assert type(pipe.scheduler.timesteps) is torch.Tensor  # its own again, between runs
        pipe.scheduler.set_timesteps(FEW)
        assert type(pipe.scheduler.timesteps) is not torch.Tensor
    assert type(pipe.scheduler.timesteps) is torch.Tensor
    assert len(pipe.scheduler.timesteps) == FEW
