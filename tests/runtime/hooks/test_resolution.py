"""Another resolution than profiled: refused, or, if allowed, run with the same share of the tokens pruned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

import sodaprof
from sodaprof.errors import MismatchError
from sodaprof.formats.schedule import Plan, Schedule, TokenRule
from sodaprof.pipelines.discover import inspect_pipeline
from tests.tape import runtime as runtime_of
from tests.tiny_pipelines import tiny_vae

ROWS = {"attn1": "CRPCRC", "attn2": "CRRCRR", "ff": "CPRCPR"}


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
    ).eval()  # fmt: skip
    made = PixArtAlphaPipeline(None, None, tiny_vae(), transformer, DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, size=8, count=1, seed=0):
    """Latents of size x size."""
    text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(7)).expand(count, -1, -1)
    mask = torch.ones(count, 5, dtype=torch.int64)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipe(
        prompt=None, negative_prompt=None, prompt_embeds=text, prompt_attention_mask=mask,
        negative_prompt_embeds=torch.zeros_like(text), negative_prompt_attention_mask=mask, generator=generators,
        num_inference_steps=6, height=size, width=size, use_resolution_binning=False, output_type="latent",
    ).images.numpy()  # fmt: skip


def schedule_for(pipe, size=8, k=0.5, rule=None):
    model, sampler, _ = inspect_pipeline(pipe, "tiny", 6, 4.5, 0, lambda entries, generators: draw(pipe, size))
    of = model.transformers["transformer"]
    rows = {site.key: ROWS[site.module] for site in of.sites}
    ks = {s.key: (round(k * s.tokens),) * ROWS[s.module].count("P") for s in of.sites if "P" in ROWS[s.module]}
    plan = Plan(of.class_name, of.fingerprint, rows, "......", ks, {})
    policy = {"name": "test", "knobs": {}}
    return Schedule({"transformer": plan}, sampler, model.shape, policy, token_rule=rule or TokenRule("feature_mean"))


@pytest.mark.parametrize("runtime", ["hooks", "graphs"])
def test_a_scaled_schedule_is_that_of_the_other_size(pipe, runtime):
    small, large = schedule_for(pipe), schedule_for(pipe, 16)
    wanted = {}
    for size, schedule in ((8, small), (16, large)):
        with sodaprof.apply(pipe, schedule):
            wanted[size] = draw(pipe, size)
    with sodaprof.apply(pipe, small, allow_resolution=True, runtime=runtime_of(runtime)) as handle:
        for size in (8, 16, 16, 8, 16, 8, 8, 16):
            assert np.array_equal(draw(pipe, size), wanted[size])
            report = handle.report()
            assert report.executed == report.planned
            assert set(report.resized.values()) == ({(16, 64)} if size == 16 else set())
        assert "16 tokens re-scaled to 64" in str(report)
        assert [cell.k for cell in handle.executor.rows[0].cells] == [0, 0, 32, 0, 0, 0]


def test_it_is_refused_unless_allowed(pipe):
    with sodaprof.apply(pipe, schedule_for(pipe)):
        with pytest.raises(MismatchError, match=r"64 tokens here, 16 in the schedule.*--allow-resolution"):
            draw(pipe, 16)
        draw(pipe)


def test_a_local_bonus_must_fill_the_other_size(pipe):
    rule = TokenRule("feature_mean", bonus=0.5, bonus_grid=8)
    with sodaprof.apply(pipe, schedule_for(pipe, 16, rule=rule), allow_resolution=True) as handle:
        draw(pipe, 16), draw(pipe, 32)
        assert handle.executor.rows[0].raster == (16, 16)
        with pytest.raises(MismatchError, match=r"12 x 12 tokens here.*blocks of 8 x 8"):
            draw(pipe, 24)
        draw(pipe, 16)
        assert handle.executor.rows[0].raster == (8, 8)


@pytest.mark.parametrize("count", [2, 3])
def test_another_batch_needs_no_permission(pipe, count):
    schedule = schedule_for(pipe)
    with sodaprof.apply(pipe, schedule) as handle:
        together = draw(pipe, count=count)
        apart = np.concatenate([draw(pipe, seed=i) for i in range(count)])
        assert handle.report().executed == handle.report().planned
    assert np.allclose(together, apart, atol=1e-4 * np.abs(apart).max())
