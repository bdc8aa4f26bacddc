"""LoRA: loaded before the schedule or after a capture, scaled, switched off, merged; always the pictures of now."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

import sodaprof
from sodaprof.runtime.attach import RUNTIMES

from .pipelines import draw, mixed_schedule, tiny_pipe
from .tape import Tapes


def arguments(runtime: str) -> dict:
    return {name: Tapes() if name == "capture" else value for name, value in RUNTIMES[runtime].items()}


def add_lora(pipe, seed=0):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "proj", "proj_out_2"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.transformer)  # within the blocks, and behind them


def layers(pipe):
    return [m for m in pipe.transformer.modules() if isinstance(m, LoraLayer)]


def scale(pipe, factor):
    for layer in layers(pipe):
        layer.scaling = {name: value * factor for name, value in layer.scaling.items()}


def switch(pipe, on):
    for layer in layers(pipe):
        layer.enable_adapters(on)


def wanted(pipe, schedule):
    with sodaprof.apply(pipe, schedule):
        return draw(pipe)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_loaded_before_the_schedule(runtime):
    pipe = tiny_pipe()
    without = wanted(pipe, mixed_schedule(pipe))
    add_lora(pipe)
    schedule = mixed_schedule(pipe)  # the sites are found as before
    assert schedule.transformers == mixed_schedule(tiny_pipe()).transformers
    expected = wanted(pipe, schedule)
    assert np.abs(expected - without).max() > 0.05
    with sodaprof.apply(pipe, schedule, **arguments(runtime)) as handle:
        for _ in range(3):
            assert np.allclose(draw(pipe), expected, atol=2e-5)
            assert handle.report().executed == handle.report().planned


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_changed_after_a_capture(runtime):
    pipe, other = tiny_pipe(), tiny_pipe()
    schedule = mixed_schedule(pipe)
    plain, seen = wanted(pipe, schedule), []

    def check(handle):
        seen.append(wanted(other, schedule))
        for _ in range(3):
            assert np.allclose(draw(pipe), seen[-1], atol=2e-5)
        if runtime in ("captured", "whole-steps"):
            assert handle.report().path.startswith("captured: 8 graphs")

    with sodaprof.apply(pipe, schedule, **arguments(runtime)) as handle:
        check(handle)
        for change in (add_lora, lambda p: scale(p, 0.25), lambda p: switch(p, False)):
            change(pipe), change(other)
            check(handle)
        assert np.array_equal(seen[-1], plain)
        for p in (pipe, other):
            switch(p, True)
            for layer in layers(p):
                layer.merge()
        check(handle)
    sizes = [np.abs(one - two).max() for i, one in enumerate(seen) for two in seen[i + 1 :]]
    assert sorted(sizes)[2] > 0.02  # all differ, but merged from scaled and off from none
