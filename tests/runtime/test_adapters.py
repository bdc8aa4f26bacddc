"""LoRA: loaded before the schedule or after a capture, scaled, switched off, merged: each change has its effect at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

import sodaprof
from tests.tape import runtime as runtime_of
from tests.tiny_pipelines import SHORT, short_schedule, tiny_pipe
from tests.tiny_pipelines import draw as draw_steps

RUNTIMES = ("hooks", "graphs", "whole-steps")  # "graphs" runs all that "compiled" does


def draw(pipe):
    return draw_steps(pipe, steps=SHORT)


def add_lora(pipe, seed=0):
    torch.manual_seed(seed)
    last = len(pipe.transformer.transformer_blocks) - 1  # of the blocks the last alone: each has to be examined
    within = rf"transformer_blocks\.{last}\.(attn1\.to_q|ff\.net\.0\.proj)"
    modules = rf"pos_embed\.proj|{within}|proj_out_2"  # before the blocks, within and after them
    inject_adapter_in_model(LoraConfig(r=2, target_modules=modules, init_lora_weights=False), pipe.transformer)


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
    pipe = tiny_pipe(layers=1)
    without = wanted(pipe, short_schedule(pipe))
    add_lora(pipe)
    schedule = short_schedule(pipe)  # the sites are found as before
    assert schedule.transformers == short_schedule(tiny_pipe(layers=1)).transformers
    expected = wanted(pipe, schedule)
    assert np.abs(expected - without).max() > 0.05
    with sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime)) as handle:
        for _ in range(3):
            assert np.allclose(draw(pipe), expected, atol=2e-5)
            assert handle.report().executed == handle.report().planned


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_changed_after_a_capture(runtime):
    pipe, other = tiny_pipe(), tiny_pipe()
    schedule = short_schedule(pipe)
    plain, seen = wanted(pipe, schedule), []

    def check(handle):
        seen.append(wanted(other, schedule))
        for _ in range(3):
            assert np.allclose(draw(pipe), seen[-1], atol=2e-5)
        if runtime in ("graphs", "whole-steps"):
            assert handle.report().path.startswith("compiled: 3 graphs")

    with sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime)) as handle:
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
