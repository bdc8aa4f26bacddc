"""Traced blocks: the bits of the hooks for every action, shared programs, refusal of blocks that branch on data."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import sodaprof
from sodaprof.errors import UnsupportedModelError
from sodaprof.runtime.compiled.engine import Compiled
from sodaprof.runtime.compiled.trace import Program
from tests.tiny_pipelines import (
    FEW,
    STEPS,
    draw,
    few,
    few_schedule,
    mixed_schedule,
    schedule_for,
    tiny_pipe,
    with_known_programs,
)
from tests.toca_cases import CASES, MAKE, Scheduler, calls_of, compiled, sharpened


def nodes(program: Program) -> int:
    """Returns the number of operators in a program."""
    return sum(node.op == "call_function" for node in program.graph.graph.nodes)


@pytest.fixture
def pipe():
    return tiny_pipe()


@pytest.mark.parametrize(
    ("make", "steps", "dtype"), [(mixed_schedule, STEPS, torch.float32), (few_schedule, FEW, torch.bfloat16)]
)
def test_every_action_is_bit_identical(make, steps, dtype):
    pipe = tiny_pipe().to(dtype)
    schedule = make(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe, steps=steps)
    with sodaprof.apply(pipe, schedule, runtime=Compiled(tables=False, graphs=False)) as handle:
        first, second = draw(pipe, steps=steps), draw(pipe, steps=steps)
        assert handle.report().executed == handle.report().planned
        assert handle.executor.engine.programs
        assert not handle.executor.engine.tables
    assert np.array_equal(first, wanted)
    assert np.array_equal(second, wanted)


def test_all_compute_is_bit_identical_to_the_plain_pipeline(pipe):
    plain = few(pipe)
    with sodaprof.apply(pipe, schedule_for(pipe, steps=FEW), runtime="compiled"):
        assert np.array_equal(few(pipe), plain)
    assert np.array_equal(few(pipe), plain)  # and after it


@pytest.mark.parametrize(
    ("name", "steps", "actions"),  # actions in the rows of the sites and of the stack
    [
        ("dit-duca-50", 12, "CPRS"), ("dit-toca-values", 12, "CPR"), ("pixart-duca-few", 6, "CPRS"),
        ("opensora-toca-little-age", 9, "CPR"), ("opensora-duca-entropy", 8, "CPRS"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_token_rules_and_skipped_stacks_are_bit_identical(name, steps, actions, tmp_path, make_cost):
    case = replace(CASES[name], steps=steps)
    torch.manual_seed(1)
    network = sharpened(MAKE[case.family](2))
    calls = calls_of(case.family, torch.linspace(999, 1, case.steps).long())
    schedule = compiled(case, network, calls[0], tmp_path, make_cost)
    plan = schedule.transformers["transformer"]
    assert set("".join([*plan.rows.values(), plan.stack])) >= set(actions)
    outputs = []
    for runtime in ("hooks", "compiled"):
        pipe = SimpleNamespace(components={"transformer": network}, scheduler=Scheduler())
        outputs.append([])
        with sodaprof.apply(pipe, schedule, runtime=runtime) as handle:
            pipe.scheduler.set_timesteps(case.steps)
            for t, call in zip(pipe.scheduler.timesteps, calls, strict=True):
                out = network(**call, return_dict=False)[0]
                outputs[-1].append((out, [row.selected for row in handle.executor.rows]))
                pipe.scheduler.step(out, t, call["hidden_states"])
            assert handle.report().executed == handle.report().planned
    for (by_hooks, chosen), (traced, chosen_again) in zip(*outputs, strict=True):
        assert torch.equal(by_hooks, traced)
        assert all(torch.equal(a, b) for a, b in zip(chosen, chosen_again, strict=True) if a is not None)


def test_layers_share_programs_without_what_only_a_reused_module_reads():
    pipe = tiny_pipe(layers=6)
    rows = {f"transformer_blocks.{i}.{m}": "CRCR" for i in range(6) for m in ("attn1", "ff")}
    with sodaprof.apply(pipe, schedule_for(pipe, rows, steps=FEW), runtime="compiled") as handle:
        few(pipe)
        programs = [program for of_build in handle.executor.engine.programs.values() for program in of_build.values()]
    assert len(programs) <= 4  # C and R, each for the first layer, whose input has other strides, and for the others
    full, reuse = max(map(nodes, programs)), min(map(nodes, programs))
    assert reuse < full / 2
    fewest = min(programs, key=nodes)
    assert not any(
        "native_layer_norm" in str(n.target) or "attention" in str(n.target) for n in fewest.graph.graph.nodes
    )


def test_new_weights_count_at_once(pipe):
    schedule = few_schedule(pipe)
    other = tiny_pipe(seed=5)
    with sodaprof.apply(other, schedule):
        wanted = few(other)
    with sodaprof.apply(pipe, schedule, runtime="compiled") as handle:
        few(pipe)
        known = handle.report().counters.programs
        pipe.transformer.load_state_dict(other.transformer.state_dict())
        assert np.array_equal(few(pipe), wanted)
        assert handle.report().counters.programs == known
        for name, parameter in list(pipe.transformer.transformer_blocks[0].ff.named_parameters()):
            module = pipe.transformer.transformer_blocks[0].ff.get_submodule(name.rpartition(".")[0])
            setattr(
                module, name.rpartition(".")[2], nn.Parameter(parameter.detach().clone())
            )  # replaced, not copied into
        assert np.array_equal(few(pipe), wanted)


def test_a_block_with_a_module_replaced_is_traced_again(pipe):
    """An adapter replaces a module in this way."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 1.5

    schedule = few_schedule(pipe)
    with sodaprof.apply(pipe, schedule, runtime="compiled"):
        before = few(pipe)
        ff = pipe.transformer.transformer_blocks[1].ff
        ff.net[2] = Adapter(ff.net[2])
        after = few(pipe)
    with sodaprof.apply(pipe, schedule):
        assert np.array_equal(few(pipe), after)
    assert not np.array_equal(before, after)


def test_a_block_that_branches_on_data_is_refused_by_name(pipe):
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    schedule = schedule_for(pipe, steps=FEW)
    block = pipe.transformer.transformer_blocks[1]
    block.ff.net[0] = Branching(block.ff.net[0])
    with (
        sodaprof.apply(pipe, schedule, runtime="compiled"),
        pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.1 \(BasicTransformerBlock\) cannot be traced"),
    ):
        few(pipe)
    assert few(pipe) is not None


def test_modules_are_as_before_after_removal(pipe):
    before = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    with with_known_programs(sodaprof.apply(pipe, few_schedule(pipe), runtime="compiled")):
        few(pipe)
    for name, module in pipe.transformer.named_modules():
        assert set(vars(module)) - before[name] <= {"_diffusers_hook", "forward"}
        assert not getattr(module, "_diffusers_hook", None) or not module._diffusers_hook.hooks
