"""`sodaprof.scheduler`: a schedule of whole steps as a diffusers scheduler makes the pictures that `apply` makes."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DEISMultistepScheduler, DiffusionPipeline, DiTPipeline, SchedulerMixin
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from msgspec.structs import replace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sodaprof
from sodaprof.errors import FormatError, MismatchError, SodaprofError, UnsupportedModelError
from sodaprof.formats.files import read_json
from sodaprof.formats.schedule import Plan, Schedule
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.pipelines.discover import config_of, inspect_pipeline
from sodaprof.pipelines.patch import patched
from tests.tiny_pipelines import STEPS, TwoPassPipeline, mixed_schedule, schedule_for
from tests.updated import CALLED, RESTING, apart, pipe_of, sample, updated, with_update
from tests.video_pipelines import draw as draw_video
from tests.video_pipelines import tiny_video_pipe
from tests.zoo import zoo_pipelines

BOTH = [(cls, s) for cls in (DiTPipeline, TwoPassPipeline) for s in ("ddim", "ddpm", "dpm", "unipc", "rectified")]
BOTH += [(TwoPassPipeline, "flow"), (TwoPassPipeline, "euler")]


@pytest.mark.parametrize(("cls", "sampler"), BOTH)
def test_pictures_are_those_of_apply(cls, sampler):
    pipe = pipe_of(cls, sampler)
    own, schedule = pipe.scheduler, updated(pipe, RESTING, stir=0.1)
    with sodaprof.apply(pipe, schedule):
        wanted, others = sample(pipe), sample(pipe, (7, 3), seed=5, guidance_scale=1.5)
    pipe.scheduler = sodaprof.scheduler(schedule)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    found = sample(pipe, steps=CALLED)
    assert len(calls) == CALLED * (1 if cls is DiTPipeline else 2)
    hook.remove()
    assert apart(found, wanted) < 2e-6
    assert apart(sample(pipe, (7, 3), seed=5, steps=CALLED, guidance_scale=1.5), others) < 2e-6
    assert np.array_equal(sample(pipe, steps=CALLED), found)  # nothing leaks from one picture to the next
    assert isinstance(pipe.scheduler, SchedulerMixin)
    assert pipe.scheduler.config.get("num_train_timesteps") == own.config.num_train_timesteps
    assert config_of(type(own).from_config(pipe.scheduler.config)) == config_of(own)  # the way back


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc"])
def test_a_schedule_of_full_steps_is_the_plain_pipeline(sampler):
    pipe = pipe_of(TwoPassPipeline, sampler)
    plain, schedule = sample(pipe), updated(pipe)
    pipe.scheduler = sodaprof.scheduler(schedule)
    assert apart(sample(pipe), plain) < 1e-5


def inspected(pipe, *arguments, **options):
    """Returns a schedule of full steps of a pipeline, as `inspect_pipeline` finds it; the arguments are those after its name."""
    model, sampler, _ = inspect_pipeline(pipe, "tiny", *arguments, **options)
    plans = {
        name: Plan(t.class_name, t.fingerprint, {s.key: "C" * sampler.steps for s in t.sites}, "." * sampler.steps)
        for name, t in model.transformers.items()
    }
    return Schedule(plans, sampler, model.shape, {"name": "test", "knobs": {}})


@pytest.mark.parametrize(
    "name", ["DiTPipeline", "PixArtAlphaPipeline", "FluxPipeline", "WanPipeline", "HunyuanDiTPipeline"]
)
def test_real_pipelines_run_it(name, monkeypatch):
    """Pipelines that pass eta and generators, sigmas and mu, read sigmas and config, draw noise from generators in a list."""
    case = zoo_pipelines.PIPELINES[name]()
    scheduler = case.pipe.scheduler
    if scheduler.config.get("clip_sample"):
        case.pipe.scheduler = type(scheduler).from_config(scheduler.config, clip_sample=False)
    whole = inspected(case.pipe, zoo_pipelines.STEPS, own=case.call)
    schedule = with_update(case.pipe, whole, "..-.-.", stir=0.1)
    with sodaprof.apply(case.pipe, schedule):
        wanted = case.draw()
    case.pipe.scheduler = sodaprof.scheduler(schedule)
    monkeypatch.setattr(zoo_pipelines, "STEPS", 4)
    assert apart(case.draw(), wanted) < 2e-6


def test_open_sora_runs_it():
    pipe, steps, kept = tiny_video_pipe(), 6, []

    def sampled(steps):
        kept.clear()
        draw_video(pipe, steps=steps)
        return kept[0]

    decode = pipe.vae.decode
    pipe.vae.decode = lambda x, *args, **kwargs: (kept.append(x.clone()), decode(x, *args, **kwargs))[1]
    whole = inspected(pipe, steps, 7.0, "a red disk moves left")
    plain = sampled(steps)
    schedule = with_update(pipe, whole, "..-.-.", stir=0.1)
    with sodaprof.apply(pipe, schedule):
        wanted = sampled(steps)
    pipe.scheduler = sodaprof.scheduler(schedule)
    assert apart(sampled(4), wanted) < 2e-6
    assert apart(plain, wanted) > 1e-3
    assert isinstance(RectifiedFlowScheduler.from_config(pipe.scheduler.config), RectifiedFlowScheduler)


def test_an_interrupted_run_has_no_effect_on_the_next():
    pipe = pipe_of(DiTPipeline, "unipc")
    pipe.scheduler = sodaprof.scheduler(updated(pipe, RESTING, stir=0.1))
    wanted, count = sample(pipe, steps=CALLED), iter(range(STEPS))

    def fail(step, *args, **kwargs):
        if next(count) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with patched(pipe.scheduler, "step", fail), pytest.raises(KeyboardInterrupt):
        sample(pipe, (7, 3), seed=5, steps=CALLED)
    assert np.array_equal(sample(pipe, steps=CALLED), wanted)


def test_half_precision_and_both_forms_of_the_result():
    pipe = pipe_of(DiTPipeline, "dpm")
    scheduler = sodaprof.scheduler(updated(pipe, RESTING, stir=0.1))
    x = torch.randn(2, 4, 8, 8).bfloat16()
    scheduler.set_timesteps(CALLED)
    one = scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(CALLED)
    assert scheduler._ring.newest == []
    other = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    assert (one.prev_sample.dtype, scheduler._ring.newest[0].dtype) == (torch.bfloat16, torch.float32)
    assert isinstance(other, tuple)
    assert torch.equal(one.prev_sample, other[0])


class Watched(TorchDispatchMode):
    """Refuses what waits for a device: tensors are on `meta`, where nothing can be read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in func.tags, func
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)}
        assert devices <= {"meta"}, (func, devices)
        return out


def test_a_step_does_not_wait_for_the_device():
    pipe = pipe_of(DiTPipeline, "unipc")
    scheduler = sodaprof.scheduler(updated(pipe, RESTING))
    scheduler.set_timesteps(CALLED, device="meta")
    x = v = torch.empty(2, 4, 8, 8, device="meta")
    timesteps = list(scheduler.timesteps)
    with Watched():
        for t in timesteps:
            x = scheduler.step(v, t, scheduler.scale_model_input(x, t)).prev_sample
    assert x.shape == v.shape


def test_defaults_of_pipelines_are_accepted_and_own_sigmas_are_refused():
    pipe = pipe_of(TwoPassPipeline, "flow")
    schedule = updated(pipe, RESTING)
    scheduler = sodaprof.scheduler(schedule)
    wanted = [t for t, action in zip(schedule.sampler.timesteps, RESTING, strict=True) if action == "."]
    for given in (
        {"num_inference_steps": CALLED, "device": "cpu", "mu": 1.15},
        {"sigmas": np.linspace(1, 1 / CALLED, CALLED), "mu": 0.3},  # FLUX and many others
        {"sigmas": torch.linspace(1, 0, CALLED + 1)[:-1].tolist()},
        {
            "timesteps": np.linspace(1000, 1, CALLED).astype(int),
            "sigmas": np.linspace(1000, 1, CALLED) / 1000,
        },  # CogView4
        {"sigmas": linear_quadratic_schedule(CALLED, 0.025)},  # Mochi
        {"timesteps": wanted},
        {"num_inference_steps": CALLED, "height": 480, "width": 640, "num_frames": 51},
    ):
        scheduler.set_timesteps(**given)
        scheduler.set_begin_index(0)
        assert scheduler.timesteps.tolist() == wanted
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == CALLED
    whole = updated(pipe_of(TwoPassPipeline, "ddim"), RESTING)
    assert sodaprof.scheduler(whole).timesteps.dtype == torch.int64  # as DDIM's own
    for given in ({"num_inference_steps": STEPS}, {"sigmas": [1.0, 0.5]}, {"timesteps": [3, 2, 1]}, {}):
        with pytest.raises(MismatchError, match=f"Call it with num_inference_steps={CALLED}"):
            scheduler.set_timesteps(**given)
    with pytest.raises(MismatchError, match=r"begins at step 2.*strength=1"):
        scheduler.set_begin_index(2)
    for given in ({"sigmas": np.linspace(1, 0.1, CALLED)}, {"timesteps": list(range(CALLED, 0, -1))}):
        with pytest.raises(MismatchError, match=f"Call it without {next(iter(given))}"):
            scheduler.set_timesteps(**given)


def test_another_size_is_refused_unless_allowed():
    schedule = updated(pipe_of(), RESTING)
    x = torch.zeros(1, 4, 8, 4)
    for scheduler, refused in (
        (sodaprof.scheduler(schedule), True),
        (sodaprof.scheduler(schedule, allow_resolution=True), False),
    ):
        for copied in (scheduler, sodaprof.JumpScheduler.from_config(scheduler.config)):
            copied.set_timesteps(CALLED)
            expected = pytest.raises(MismatchError, match=r"\[4, 8, 4\].*allow_resolution=True")
            with expected if refused else nullcontext():
                copied.step(x, copied.timesteps[0], x)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm", "unipc", "euler", "flow", "rectified"])
def test_saved_copied_and_pickled_schedulers_make_the_same_latents(sampler, tmp_path):
    pipe = pipe_of(TwoPassPipeline if sampler in ("flow", "euler") else DiTPipeline, sampler)
    own, schedule = pipe.scheduler, updated(pipe, RESTING, stir=0.1)
    scheduler = pipe.scheduler = sodaprof.scheduler(schedule)
    wanted = sample(pipe, steps=CALLED)
    if type(pipe) is DiTPipeline:
        pipe.save_pretrained(tmp_path / "pipe")
        assert read_json(tmp_path / "pipe/model_index.json")["scheduler"] == ["sodaprof", "JumpScheduler"]
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
        loaded.set_progress_bar_config(disable=True)
        assert apart(sample(loaded, steps=CALLED), wanted) < 1e-6
    scheduler.save_pretrained(tmp_path / "alone")
    for other in (
        type(scheduler).from_pretrained(tmp_path / "alone"),
        type(scheduler).from_config(scheduler.config),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ):
        assert type(other) is sodaprof.JumpScheduler
        assert dict(other.config) == dict(scheduler.config)
        pipe.scheduler = other
        assert np.array_equal(sample(pipe, steps=CALLED), wanted)
    assert config_of(type(own).from_pretrained(tmp_path / "alone")) == config_of(own)  # the way back
    assert set(scheduler.compatibles) == set(own.compatibles)


def test_a_sampler_made_of_the_config_gives_the_scheduler_again():
    scheduler = sodaprof.scheduler(updated(pipe_of(DiTPipeline, "dpm"), RESTING))
    other = DEISMultistepScheduler.from_config(scheduler.config)
    assert other.config.solver_type != scheduler.config.solver_type
    again = sodaprof.JumpScheduler.from_config(other.config)
    assert {key: again.config[key] for key in scheduler.config} == dict(scheduler.config)
    with pytest.raises(MismatchError, match="solver_order=2, found 3"):
        sodaprof.JumpScheduler.from_config(scheduler.config, solver_order=3)
    with pytest.raises(FormatError, match=r"sodaprof\.scheduler"):
        sodaprof.JumpScheduler.from_config(DDIMScheduler().config)
    with pytest.raises(FormatError, match="_schedule: "):
        sodaprof.JumpScheduler.from_config(
            {**scheduler.config, "_schedule": {"format": "sodaprof.schedule", "version": 1}}
        )
    with pytest.raises(UnsupportedModelError, match=r"scheduler\.save_pretrained"):
        scheduler.save_config("folder")


@pytest.mark.parametrize("sampler", ["ddim", "dpm", "unipc", "euler", "flow", "rectified"])
def test_noise_is_added_as_the_sampler_adds_it(sampler):
    pipe = pipe_of(TwoPassPipeline, sampler)
    scheduler, own = sodaprof.scheduler(updated(pipe, RESTING)), pipe.scheduler
    own.set_timesteps(STEPS)
    method = "scale_noise" if sampler == "flow" else "add_noise"
    assert hasattr(scheduler, "add_noise") == hasattr(own, "add_noise")
    assert hasattr(scheduler, "scale_noise") == hasattr(own, "scale_noise")
    x, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for index, t in enumerate(scheduler.timesteps):
        arguments = (x, t.repeat(2), noise) if sampler == "flow" else (x, noise, t.repeat(2))
        assert torch.equal(getattr(scheduler, method)(*arguments), getattr(own, method)(*arguments))
        assert scheduler.index_for_timestep(t) == index
    with pytest.raises(MismatchError, match="strength=1"):
        scheduler.index_for_timestep(-1)
    with pytest.raises(AttributeError, match="'JumpScheduler' object has no attribute 'nothing'"):
        _ = scheduler.nothing


def test_steps_in_another_order_are_refused():
    scheduler = sodaprof.scheduler(updated(pipe_of(), RESTING))
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(SodaprofError, match="call set_timesteps first"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(CALLED)
    with pytest.raises(MismatchError, match="Run the whole trajectory"):
        scheduler.step(x, scheduler.timesteps[1], x)
    with pytest.raises(UnsupportedModelError, match=r"eta=0\.5"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5)
    with pytest.raises(UnsupportedModelError, match=r"an output \[1, 8, 8, 8\]"):
        scheduler.step(torch.zeros(1, 8, 8, 8), scheduler.timesteps[0], x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(SodaprofError, match="no step to take"):
        scheduler.step(x, t, x)


def test_what_a_plain_scheduler_cannot_run_is_refused(tmp_path):
    pipe = pipe_of()
    with pytest.raises(UnsupportedModelError, match="F cells, which work inside the network"):
        sodaprof.scheduler(mixed_schedule(pipe))
    with pytest.raises(UnsupportedModelError, match="no update"):
        sodaprof.scheduler(schedule_for(pipe))
    schedule = updated(pipe, RESTING)
    clipping = replace(schedule.sampler, config=schedule.sampler.config | {"clip_sample": True})
    with pytest.raises(UnsupportedModelError, match="clip_sample=True"):
        sodaprof.scheduler(replace(schedule, sampler=clipping))
    with pytest.raises(UnsupportedModelError, match="has no NoScheduler"):
        sodaprof.scheduler(replace(schedule, sampler=replace(schedule.sampler, class_name="NoScheduler")))
    dpm = updated(pipe_of(DiTPipeline, "dpm"), RESTING)
    shifted = replace(dpm.sampler, timesteps=tuple(t - 1 for t in dpm.sampler.timesteps))
    with pytest.raises(UnsupportedModelError, match=r"not those that DPMSolver.*sodaprof\.apply"):
        sodaprof.scheduler(replace(dpm, sampler=shifted))
    with pytest.raises(MismatchError, match="basis"):
        sodaprof.scheduler(replace(dpm, update=replace(dpm.update, basis="output")))
    schedule.save(tmp_path / "s.json")
    assert len(sodaprof.scheduler(tmp_path / "s.json").timesteps) == CALLED
    assert isinstance(DDIMScheduler.from_config(sodaprof.scheduler(schedule).config), DDIMScheduler)
