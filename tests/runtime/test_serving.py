"""What servers do to a pipeline: offload, tiled decoding, callbacks, other processors; and what is refused."""

from __future__ import annotations

import functools
from itertools import count

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor

import sodaprof
from sodaprof.errors import MismatchError
from sodaprof.formats.schedule import TokenRule
from sodaprof.pipelines.patch import patched
from tests.tape import runtime as runtime_of
from tests.tiny_pipelines import (
    MIXED_K,
    MIXED_ROWS,
    SHORT,
    STEPS,
    TwoPassPipeline,
    draw,
    mixed_schedule,
    schedule_for,
    short_schedule,
    tiny_pipe,
    with_known_programs,
)


@pytest.fixture
def pipe():
    return tiny_pipe()


def wanted(pipe, schedule):
    with sodaprof.apply(pipe, schedule):
        return draw(pipe, steps=schedule.steps)


def short(pipe):
    return draw(pipe, steps=SHORT)


@pytest.mark.parametrize(
    ("runtime", "before"), [("hooks", True), ("hooks", False), ("graphs", True), ("graphs", False)]
)
def test_model_offload_before_and_after(runtime, before):
    pipe = tiny_pipe(layers=1)
    schedule, plain = short_schedule(pipe), short(pipe)
    expected = wanted(pipe, schedule)
    if before:
        pipe.enable_model_cpu_offload(device="cpu")  # registers its hooks again after every call of the pipeline
    with with_known_programs(sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime))) as handle:
        if not before:
            short(pipe)
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(4):
            assert np.array_equal(short(pipe), expected)
            assert handle.report().executed == handle.report().planned
    assert np.array_equal(short(pipe), plain)
    with handle:
        assert np.array_equal(short(pipe), expected)
    pipe.remove_all_hooks()
    assert np.array_equal(short(pipe), plain)
    assert "forward" not in vars(pipe.transformer) or not hasattr(pipe.transformer, "_hf_hook")


def test_offload_that_ends_under_a_schedule(pipe):
    schedule = mixed_schedule(pipe)
    expected = wanted(pipe, schedule)
    pipe.enable_model_cpu_offload(device="cpu")
    with sodaprof.apply(pipe, schedule) as handle:
        draw(pipe)
        pipe.remove_all_hooks()
        assert np.array_equal(draw(pipe), expected)
        assert handle.report().executed == handle.report().planned


@pytest.mark.parametrize("before", [True, False])
def test_group_offload_is_refused(pipe, before):
    schedule = mixed_schedule(pipe)
    pipe.transformer._supports_group_offloading = True
    cpu = torch.device("cpu")
    groups = lambda: pipe.transformer.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1)  # noqa: E731
    if before:
        groups()
        with pytest.raises(MismatchError, match=r"offloaded in groups.*enable_model_cpu_offload"):
            sodaprof.apply(pipe, schedule)
        return
    with sodaprof.apply(pipe, schedule):
        draw(pipe)
        groups()
        with pytest.raises(MismatchError, match=r"offloaded in groups.*enable_model_cpu_offload"):
            draw(pipe)


def test_tiled_and_sliced_decoding(pipe):
    schedule, latents, decode = mixed_schedule(pipe), [], pipe.vae.decode
    pipe.vae.decode = lambda z, **kwargs: latents.append(z) or decode(z, **kwargs)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    expected = wanted(pipe, schedule)
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()
    assert np.allclose(expected, wanted(pipe, schedule), atol=1e-5)
    assert torch.equal(*latents)  # decoding has no effect on the loop


class Calling(TwoPassPipeline):
    """Calls back after each step, as diffusers' pipelines do, and takes the latents that the callback returns."""

    callback = None

    @functools.wraps(TwoPassPipeline.__call__)
    def __call__(self, *args, **kwargs):
        steps = count()

        def called_back(step, *a, **kw):
            out = step(*a, **kw)
            given = {"latents": out.prev_sample}
            out.prev_sample = (self.callback(self, next(steps), None, given) or given)["latents"]
            return out

        with patched(self.scheduler, "step", called_back):
            return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("runtime", ["hooks", "graphs"])
def test_callbacks_between_steps_see_and_change_the_latents(runtime):
    pipe = tiny_pipe(layers=1, cls=Calling)
    schedule, seen = schedule_for(pipe, {"transformer_blocks.0.ff": "CRRCRRCR"}), []

    def callback(pipe, step, timestep, given):
        seen.append(given["latents"].clone())
        return {"latents": given["latents"] * 1.1} if step == 3 else None

    pipe.callback = callback
    expected = wanted(pipe, schedule)
    before = list(seen)
    with with_known_programs(sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime))):
        for _ in range(4):
            seen.clear()
            assert np.array_equal(draw(pipe), expected)
            assert len(seen) == STEPS
            assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


@pytest.mark.parametrize("runtime", ["hooks", "compiled", "graphs"])
def test_other_attention_processors_count_from_the_next_picture_on(pipe, runtime):
    schedule = short_schedule(pipe)
    expected = wanted(pipe, schedule)

    class Half(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * 0.5

    with sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime)) as handle:
        for _ in range(4):
            assert np.array_equal(short(pipe), expected)
        pipe.transformer.transformer_blocks[-1].attn1.set_processor(Half())  # of one: each has to be examined
        pictures = [short(pipe) for _ in range(3)]
        assert handle.report().executed == handle.report().planned
    with_others = wanted(pipe, schedule)
    assert np.abs(with_others - expected).max() > 0.01
    assert all(np.array_equal(p, with_others) for p in pictures)


def test_a_processor_without_the_attention_that_a_rule_reads_is_refused(pipe):
    rule = TokenRule("attention_received", age_weight=0.5, age_period=3)
    rows = {site: row.replace("F", "R") for site, row in MIXED_ROWS.items()}
    schedule = schedule_for(pipe, rows, MIXED_K, {}, rule)
    with sodaprof.apply(pipe, schedule):
        draw(pipe)
        for block in pipe.transformer.transformer_blocks:
            block.attn1.set_processor(AttnProcessor())  # without scaled_dot_product_attention
        with pytest.raises(
            sodaprof.SodaprofError, match=r"scaled_dot_product_attention 0 times.*set_attention_backend"
        ):
            draw(pipe)


class Partial(TwoPassPipeline):
    """Starts late, as image to image does with a strength below 1."""

    @functools.wraps(TwoPassPipeline.__call__)
    def __call__(self, *args, **kwargs):
        def later(set_timesteps, *a, **kw):
            set_timesteps(*a, **kw)
            self.scheduler.timesteps = self.scheduler.timesteps[2:]
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(2)

        with patched(self.scheduler, "set_timesteps", later):
            return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(("dpm", "on_host"), [(True, True), (True, False), (False, True)])
def test_a_run_that_starts_late_is_refused(monkeypatch, dpm, on_host):
    pipe, whole = tiny_pipe(cls=Partial), tiny_pipe(cls=TwoPassPipeline)
    if dpm:
        for p in (pipe, whole):
            p.scheduler = DPMSolverMultistepScheduler.from_config(p.scheduler.config)
        if not on_host:  # timesteps on a GPU are not read; the scheduler's own count is
            monkeypatch.setattr("sodaprof.pipelines.clock.Clock._check_step", lambda *_: None)
    with sodaprof.apply(pipe, schedule_for(whole)), pytest.raises(MismatchError, match="strength 1"):
        draw(pipe)
