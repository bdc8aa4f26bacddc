"""Arguments of later runs are compared with those that the tables were made for; on a device without a host sync."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sodaprof
from sodaprof.errors import MismatchError
from sodaprof.runtime.compiled import arguments
from sodaprof.runtime.compiled.engine import Compiled
from tests.tape import Tapes
from tests.tiny_pipelines import FEW, TwoPassPipeline, few, few_schedule, tiny_pipe, with_known_programs


def test_a_timestep_expanded_to_the_batch_is_compared_on_the_device():
    compared = arguments.RunArguments([0])
    # fake tensors need no GPU and have no values, so a host sync would fail
    with FakeTensorMode(), torch.device("cuda:0"):
        timestep, other = torch.tensor(7).expand(2), torch.tensor(7).expand(2)
        prompt, again = torch.zeros(2, 300, 64), torch.zeros(2, 300, 64)
        for leaf, expected in ((timestep, other), (prompt, again), ((timestep / 1000).half(), (other / 1000).half())):
            assert compared.is_same(leaf, expected)
        assert compared.different.device.type == "cuda"
        assert not compared.is_same(timestep, timestep.float())
        assert not compared.is_same(timestep, torch.zeros(3))
        assert not compared.is_same(timestep, None)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("cls", [None, TwoPassPipeline])
def test_steps_are_replayed_if_arguments_are_on_a_device(monkeypatch, cls, scaled):
    pipe, tapes = tiny_pipe(**({"cls": cls} if cls else {})), Tapes()
    schedule = few_schedule(pipe)
    if scaled:  # as Flux does: a new tensor for the whole batch at each call, no expanded one
        pipe.transformer.register_forward_pre_hook(_scaled, with_kwargs=True)
    with sodaprof.apply(pipe, schedule):
        wanted, others = few(pipe), few(pipe, (7, 3), seed=5)
    monkeypatch.setattr(arguments, "on_host", lambda tensor: False)
    with with_known_programs(sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=tapes))) as handle:
        few(pipe), few(pipe), few(pipe)
        calls = 2 if cls else 1
        for labels, seed, pictures in (((1, 2), 0, wanted), ((7, 3), 5, others), ((1, 2), 0, wanted)):
            played = tapes.played
            assert np.array_equal(few(pipe, labels, seed=seed), pictures)
            assert tapes.played - played == calls * (FEW + 1)  # each call, and the tables of each
        assert handle.report().path.startswith("compiled: ")


def test_a_later_run_compares_only_its_latents_on_the_host(monkeypatch):
    class Equal(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.equal.default
            return func(*args, **(kwargs or {}))

    pipe = tiny_pipe()
    monkeypatch.setattr(arguments, "on_host", lambda tensor: False)
    with with_known_programs(sodaprof.apply(pipe, few_schedule(pipe), runtime=Compiled(graphs=Tapes()))):
        few(pipe), few(pipe), few(pipe)
        with Equal() as equal:
            few(pipe)
    assert equal.count == 1  # whether the batch holds both guidance branches


def _scaled(module, args, kwargs):
    assert kwargs["timestep"].shape == (4,) or kwargs["timestep"].shape == (2,)
    return args, kwargs | {"timestep": kwargs["timestep"].float() / 2}


@pytest.mark.parametrize("name", ["timestep", "class_labels"])  # one changes from step to step, the other does not
def test_other_arguments_than_recorded_fail_once_and_run_without_tables_afterwards(monkeypatch, name):
    pipe, shift = tiny_pipe(), [0]
    schedule = few_schedule(pipe)

    def shifted(module, args, kwargs):
        return args, kwargs | {name: kwargs[name] + shift[0] * (kwargs["timestep"] < 600)}

    pipe.transformer.register_forward_pre_hook(shifted, with_kwargs=True)
    with sodaprof.apply(pipe, schedule):
        wanted = few(pipe)
        shift[0] = -1
        others = few(pipe)
    assert not np.array_equal(wanted, others)
    for on_host in (True, False):
        monkeypatch.setattr(arguments, "on_host", lambda tensor, found=on_host: found)
        shift[0] = 0
        with with_known_programs(sodaprof.apply(pipe, schedule, runtime="compiled")):
            for _ in range(3):
                assert np.array_equal(few(pipe), wanted)
            shift[0] = -1
            if not on_host:
                with pytest.raises(MismatchError, match=r"other arguments .* Call it again"):
                    few(pipe)
            assert np.array_equal(few(pipe), others)
            shift[0] = 0
            assert np.array_equal(few(pipe), wanted)
