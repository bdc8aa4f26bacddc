"""Lowered blocks: the same bits as through the hooks, for every action; shared programs; refused where data decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sodaprof
from sodaprof.errors import UnsupportedModelError
from sodaprof.runtime.lower import Program

from .pipelines import SITES, STEPS, draw, mixed_schedule, schedule_for, tiny_pipe
from .test_toca_runtime import CASES, MAKE, Scheduler, calls_of, compiled, sharpened


def nodes(program: Program) -> int:
    """Operators that are run."""
    return sum(node.op == "call_function" for node in program.graph.graph.nodes)


@pytest.fixture
def pipe():
    return tiny_pipe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_action_is_bit_identical(dtype):
    pipe = tiny_pipe().to(dtype)
    schedule = mixed_schedule(pipe)
    with sodaprof.apply(pipe, schedule):
        eager = draw(pipe)
    with sodaprof.apply(pipe, schedule, lower=True) as handle:
        first, second = draw(pipe), draw(pipe)
        assert handle.report().executed == handle.report().planned
        assert handle.programs
    assert np.array_equal(first, eager)
    assert np.array_equal(second, eager)


def test_all_compute_is_bit_identical_to_the_plain_pipeline(pipe):
    plain = draw(pipe)
    with sodaprof.apply(pipe, schedule_for(pipe), lower=True):
        assert np.array_equal(draw(pipe), plain)
    assert np.array_equal(draw(pipe), plain)  # and after it


@pytest.mark.parametrize(
    "name", ["dit-duca-50", "dit-toca-values", "pixart-duca-few", "opensora-toca-little-age", "opensora-duca-entropy"]
)
@torch.no_grad()
def test_token_rules_and_skipped_stacks_are_bit_identical(name, tmp_path, make_cost):
    from types import SimpleNamespace

    case = CASES[name]
    torch.manual_seed(1)
    network = sharpened(MAKE[case.family](2))
    calls = calls_of(case.family, torch.linspace(999, 1, case.steps).long())
    schedule = compiled(case, network, calls[0], tmp_path, make_cost)
    outputs = []
    for lower in (False, True):
        pipe = SimpleNamespace(components={"transformer": network}, scheduler=Scheduler())
        outputs.append([])
        with sodaprof.apply(pipe, schedule, lower=lower) as handle:
            pipe.scheduler.set_timesteps(case.steps)
            for t, call in zip(pipe.scheduler.timesteps, calls, strict=True):
                out = network(**call, return_dict=False)[0]
                outputs[-1].append((out, [row.selected for row in handle.rows]))
                pipe.scheduler.step(out, t, call["hidden_states"])
            assert handle.report().executed == handle.report().planned
    for (eager, chosen), (lowered, also) in zip(*outputs, strict=True):
        assert torch.equal(eager, lowered)
        assert all(torch.equal(a, b) for a, b in zip(chosen, also, strict=True) if a is not None)


def test_layers_share_programs_and_what_only_fed_a_reused_module_is_gone():
    pipe = tiny_pipe(layers=6)
    schedule = schedule_for(
        pipe, {f"transformer_blocks.{i}.{m}": "CRCRCRCR" for i in range(6) for m in ("attn1", "ff")}
    )
    with sodaprof.apply(pipe, schedule, lower=True) as handle:
        draw(pipe)
        programs = list(handle.programs.values())
    assert (
        len(programs) <= 4
    )  # C and R, each for the first layer, whose input lies otherwise in memory, and for the rest
    full, reuse = max(map(nodes, programs)), min(map(nodes, programs))
    assert reuse < full / 2
    fewest = min(programs, key=nodes)
    assert not any(
        "native_layer_norm" in str(n.target) or "attention" in str(n.target) for n in fewest.graph.graph.nodes
    )


def test_new_weights_count_at_once(pipe):
    schedule = mixed_schedule(pipe)
    other = tiny_pipe(seed=5)
    with sodaprof.apply(other, schedule):
        wanted = draw(other)
    with sodaprof.apply(pipe, schedule, lower=True) as handle:
        draw(pipe)
        known = len(handle.programs)
        pipe.transformer.load_state_dict(other.transformer.state_dict())
        assert np.array_equal(draw(pipe), wanted)
        assert len(handle.programs) == known
        for name, parameter in list(pipe.transformer.transformer_blocks[0].ff.named_parameters()):
            module = pipe.transformer.transformer_blocks[0].ff.get_submodule(name.rpartition(".")[0])
            setattr(
                module, name.rpartition(".")[2], nn.Parameter(parameter.detach().clone())
            )  # replaced, not copied into
        assert np.array_equal(draw(pipe), wanted)


def test_what_is_built_into_a_block_afterwards_is_traced_anew(pipe):
    """As an adapter is: a module in a module's place."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 1.5

    schedule = mixed_schedule(pipe)
    with sodaprof.apply(pipe, schedule, lower=True):
        before = draw(pipe)
        ff = pipe.transformer.transformer_blocks[1].ff
        ff.net[2] = Adapter(ff.net[2])
        after = draw(pipe)
    with sodaprof.apply(pipe, schedule):
        assert np.array_equal(draw(pipe), after)
    assert not np.array_equal(before, after)


def test_other_batch_sizes_get_programs_of_their_own(pipe):
    schedule = mixed_schedule(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = [draw(pipe, labels) for labels in ((1, 2), (3,), (1, 2))]
    with sodaprof.apply(pipe, schedule, lower=True):
        for labels, pictures in zip(((1, 2), (3,), (1, 2)), wanted, strict=True):
            assert np.array_equal(draw(pipe, labels), pictures)


def test_a_block_that_branches_on_data_is_refused_by_name(pipe):
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    schedule = schedule_for(pipe)
    block = pipe.transformer.transformer_blocks[1]
    block.ff.net[0] = Branching(block.ff.net[0])
    with (
        sodaprof.apply(pipe, schedule, lower=True),
        pytest.raises(
            UnsupportedModelError, match=r"transformer_blocks\.1 \(BasicTransformerBlock\) cannot be lowered"
        ),
    ):
        draw(pipe)
    assert draw(pipe) is not None


def test_an_exception_in_a_step_harms_nothing(pipe):
    schedule = mixed_schedule(pipe)
    with sodaprof.apply(pipe, schedule, lower=True):
        wanted, calls = draw(pipe), []

        def fail(*_):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt

        trip = pipe.transformer.transformer_blocks[1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
        trip.remove()
        assert np.array_equal(draw(pipe), wanted)


def test_nothing_is_left_on_the_modules(pipe):
    before = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    with sodaprof.apply(pipe, mixed_schedule(pipe), lower=True):
        draw(pipe)
    for name, module in pipe.transformer.named_modules():
        assert set(vars(module)) - before[name] <= {"_diffusers_hook", "forward"}
        assert not getattr(module, "_diffusers_hook", None) or not module._diffusers_hook.hooks


def test_two_pass_guidance_keeps_the_branches_apart():
    from .pipelines import TwoPassPipeline

    pipe = tiny_pipe(cls=TwoPassPipeline)
    schedule = schedule_for(pipe, {SITES[1]: "CR" + "C" * (STEPS - 2), SITES[2]: "CRRC" + "R" * (STEPS - 4)})
    with sodaprof.apply(pipe, schedule):
        wanted = draw(pipe)
    with sodaprof.apply(pipe, schedule, lower=True):
        assert np.array_equal(draw(pipe), wanted)
