"""Another cache on the same transformer: refused before and after `apply`, and whole again afterwards."""

from __future__ import annotations

import re
import types

import diffusers.hooks
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_taylorseer_cache,
)

import sodaprof
from sodaprof.errors import MismatchError
from sodaprof.pipelines.discover import inspect_pipeline
from tests.tiny_flux import STEPS, draw, flux_call, flux_pipe, flux_schedule

CACHES = {
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe._current_timestep,
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe._current_timestep, is_guidance_distilled=True, tensor_format="BCHW",
        attention_weight_callback=lambda _: 0.5,
    ),
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "TaylorSeerCache": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    "MagCache": lambda pipe: MagCacheConfig(
        threshold=0.5, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, retention_ratio=0.1
    ),
    "SeaCache": lambda pipe: SeaCacheConfig(threshold=0.5),
}  # fmt: skip
OWN_FAULT = {"FasterCache"}  # diffusers' own draws no picture with FLUX


@pytest.fixture(scope="module")
def schedule():
    return flux_schedule(flux_pipe())


def cached(pipe):
    """Returns the picture with the cache, which is told to begin anew."""
    pipe.transformer._reset_stateful_cache()
    return draw(pipe)


def follow(pipe, error):
    """Types what the message advises."""
    exec(re.search(r"Disable it: (.*)", str(error)).group(1), {"pipe": pipe, "diffusers": diffusers})


def check_refused(pipe, schedule, tmp_path, name):
    """Checks that all entries refuse the cache by name, and returns the error."""
    with pytest.raises(MismatchError, match=name):
        inspect_pipeline(pipe, "tiny", STEPS, own=flux_call(pipe))
    with pytest.raises(MismatchError, match=name):
        sodaprof.profile(pipe, tmp_path / "p", steps=STEPS, samples=1, max_interval=2, call=flux_call(pipe))
    assert not (tmp_path / "p").exists()
    with pytest.raises(MismatchError, match=name) as refused:
        sodaprof.apply(pipe, schedule)
    return refused.value


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers_enabled_before(schedule, tmp_path, name):
    pipe = flux_pipe()
    plain = draw(pipe)
    pipe.transformer.enable_cache(CACHES[name](pipe))
    before = None if name in OWN_FAULT else cached(pipe)
    error = check_refused(pipe, schedule, tmp_path, name)
    assert name in OWN_FAULT or torch.equal(cached(pipe), before)
    follow(pipe, error)
    assert torch.equal(draw(pipe), plain)
    with sodaprof.apply(pipe, schedule):
        draw(pipe)


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers_enabled_after(schedule, name, runtime):
    pipe, other = flux_pipe(), flux_pipe()
    plain = draw(pipe)
    other.transformer.enable_cache(CACHES[name](other))
    handle = sodaprof.apply(pipe, schedule, runtime=runtime)
    if runtime == "hooks":
        wanted = draw(pipe)
    pipe.transformer.enable_cache(CACHES[name](pipe))
    with pytest.raises(MismatchError, match=name):
        draw(pipe)
    handle.remove()
    assert name in OWN_FAULT or torch.equal(cached(pipe), cached(other))
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), plain)
    if runtime == "hooks":
        with sodaprof.apply(pipe, schedule):
            assert torch.equal(draw(pipe), wanted)
        assert torch.equal(draw(pipe), plain)


def test_a_cache_enabled_after_and_disabled_as_advised_leaves_the_schedule(schedule):
    pipe = flux_pipe()
    plain = draw(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe)
        for make in CACHES.values():
            pipe.transformer.enable_cache(make(pipe))
            with pytest.raises(MismatchError) as refused:
                draw(pipe)
            follow(pipe, refused.value)
            assert torch.equal(draw(pipe), wanted)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("put_on", "name"), [(apply_first_block_cache, "FirstBlockCache"), (apply_taylorseer_cache, "TaylorSeerCache")]
)
def test_a_cache_put_on_by_a_function_of_diffusers(schedule, tmp_path, put_on, name):
    pipe = flux_pipe()
    plain = draw(pipe)
    put_on(pipe.transformer, CACHES[name](pipe))
    follow(pipe, check_refused(pipe, schedule, tmp_path, "of diffusers"))
    assert torch.equal(draw(pipe), plain)
    with sodaprof.apply(pipe, schedule):
        draw(pipe)


def as_cache_dit(network):
    """Replaces `forward` as cache-dit does: by a function of its own modules, which it removes later."""
    body = types.FunctionType((lambda self, *a, **kw: type(self).forward(self, *a, **kw)).__code__, globals())
    body.__module__ = "cache_dit.caching.cache_adapters"
    network.forward = types.MethodType(body, network)
    network._is_cached = True


@pytest.mark.parametrize("mark", [True, False])
def test_cache_dit(schedule, tmp_path, mark):
    pipe = flux_pipe()
    plain = draw(pipe)
    as_cache_dit(pipe.transformer)
    if not mark:
        del pipe.transformer._is_cached
    own = pipe.transformer.forward
    error = check_refused(pipe, schedule, tmp_path, "cache-dit")
    assert "cache_dit.disable_cache(pipe)" in str(error)
    assert pipe.transformer.forward is own
    del pipe.transformer.forward
    vars(pipe.transformer).pop("_is_cached", None)
    with sodaprof.apply(pipe, schedule):
        draw(pipe)
        as_cache_dit(pipe.transformer)
        with pytest.raises(MismatchError, match="cache-dit"):
            draw(pipe)
        own = pipe.transformer.forward
    assert pipe.transformer.forward is own
    assert torch.equal(draw(pipe), plain)
