"""Runs that `inspect` and `profile` refuse, each by what is so, and which leave the pipeline as it was."""

from __future__ import annotations

from itertools import count

import diffusers
import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.errors import MismatchError, UnsupportedModelError
from sodaprof.pipelines.discover import inspect_pipeline
from tests.tiny_pipelines import SHORT, TwoPassPipeline, draw, schedule_for, tiny_pipe

STEPS = 6


@pytest.fixture
def sd3():
    torch.manual_seed(0)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(network, diffusers.FlowMatchEulerDiscreteScheduler(), *[None] * 7)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def skipping(pipe, start=0.01, stop=0.6, layers=(1,)):
    """Returns the pipeline's call with skip-layer guidance between two shares of the steps."""

    def call(entries, generators):
        texts = torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(int(e))) for e in entries])
        pooled = texts[:, 0, :8]
        return pipe(
            prompt_embeds=texts, pooled_prompt_embeds=pooled, negative_prompt_embeds=texts * 0, height=64, width=64,
            negative_pooled_prompt_embeds=pooled * 0, generator=generators, num_inference_steps=STEPS,
            guidance_scale=4.0, output_type="latent", return_dict=False, skip_guidance_layers=layers and list(layers),
            skip_layer_guidance_start=start, skip_layer_guidance_stop=stop,
        )[0]  # fmt: skip

    return call


def profiled(pipe, folder, **options):
    sodaprof.profile(pipe, folder / "p", samples=1, max_interval=2, **options)


def test_skip_layer_guidance_at_some_steps(sd3, tmp_path):
    with pytest.raises(MismatchError, match=r"Step 1 has network call 2, .* skipped layers"):
        profiled(sd3, tmp_path, steps=STEPS, call=skipping(sd3))
    profiled(sd3, tmp_path, steps=STEPS, call=skipping(sd3, layers=None))  # as advised
    schedule = sodaprof.compile_schedule(tmp_path / "p", "1.3x", "fora")
    with sodaprof.apply(sd3, schedule), pytest.raises(MismatchError, match=r"Step 1 has network call 2"):
        skipping(sd3)([1], [torch.Generator().manual_seed(1)])


def test_skip_layer_guidance_from_the_first_step(sd3, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"Call 2 of transformer .*skip-layer guidance"):
        profiled(sd3, tmp_path, steps=STEPS, call=skipping(sd3, -1, 2))


def test_a_branch_that_runs_other_layers():
    pipe, calls = tiny_pipe(cls=TwoPassPipeline), count()
    network, forward, blocks = pipe.transformer, pipe.transformer.forward, pipe.transformer.transformer_blocks

    def alternating(*args, **kwargs):
        """Runs each second call without the last block, in a batch of the same size."""
        network.transformer_blocks = blocks[:-1] if next(calls) % 2 else blocks
        try:
            return forward(*args, **kwargs)
        finally:
            network.transformer_blocks = blocks

    network.forward = alternating
    with pytest.raises(UnsupportedModelError, match="runs other layers than call 1"):
        inspect_pipeline(pipe, "tiny", SHORT, 4.0, 1)


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "HeunDiscreteScheduler"])
def test_samplers_with_more_timesteps_than_steps(name, tmp_path):
    pipe = tiny_pipe(layers=1)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedModelError, match=r"runs 7 timesteps for --steps 4.*DPMSolverMultistepScheduler"):
        profiled(pipe, tmp_path, steps=4, prompts=[1])
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    profiled(pipe, tmp_path, steps=4, prompts=[1])


def test_a_profile_that_fails_to_begin_leaves_the_pipeline_as_it_was(monkeypatch, tmp_path):
    pipe = tiny_pipe(layers=1)
    plain, cls = draw(pipe, steps=SHORT), type(pipe.scheduler)

    def fail(*_, **__):
        raise TypeError("a damaged state file")

    with monkeypatch.context() as patch:
        patch.setattr("sodaprof.profiler.taps.all_tapped", fail)
        with pytest.raises(TypeError, match="damaged"):
            profiled(pipe, tmp_path, steps=SHORT, prompts=[1])
    assert type(pipe.scheduler) is cls
    assert np.array_equal(draw(pipe, steps=SHORT), plain)


def test_a_report_names_the_guidance_scale_if_there_is_one():
    for scale in (None, 4.0):
        pipe = tiny_pipe(layers=1)
        with sodaprof.apply(pipe, schedule_for(pipe, steps=SHORT, guidance_scale=scale)) as handle:
            assert ("profiled at guidance" in str(handle.report())) is (scale is not None)
