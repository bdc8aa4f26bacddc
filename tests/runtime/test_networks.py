"""What is done to the network itself: torch.compile, another network in its place, copies and pickles of the pipeline."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.errors import MismatchError
from sodaprof.pipelines.discover import inspect_pipeline
from tests.tiny_pipelines import SHORT, draw, short_schedule, tiny_pipe


@pytest.fixture(scope="module")
def schedule():
    return short_schedule(tiny_pipe(layers=1))


@pytest.fixture
def pipe():
    return tiny_pipe(layers=1)


def short(pipe):
    return draw(pipe, steps=SHORT)


def compile_in_place(pipe):
    """Compiles the network and its blocks; a graph break, or one recompilation too many, is an error."""
    for module in (pipe.transformer, *pipe.transformer.transformer_blocks):
        module.compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize("before", [True, False])
def test_a_network_compiled_in_place(pipe, schedule, before):
    with sodaprof.apply(pipe, schedule):
        wanted = short(pipe)
    if before:
        compile_in_place(pipe)
    with sodaprof.apply(pipe, schedule) as handle:
        if not before:
            short(pipe)
            compile_in_place(pipe)
        for _ in range(2):
            assert np.array_equal(short(pipe), wanted)
            assert handle.report().executed == handle.report().planned
    assert all(m._compiled_call_impl is not None for m in (pipe.transformer, pipe.transformer.transformer_blocks[0]))


def test_a_network_compiled_in_place_is_profiled(schedule, tmp_path):
    tables = []
    for compiled in (False, True):
        pipe = tiny_pipe(layers=1)
        if compiled:
            compile_in_place(pipe)
        folder = tmp_path / str(compiled)
        sodaprof.profile(pipe, folder, steps=SHORT, samples=1, max_interval=2, prompts=[1])
        tables.append((folder / "caching.parquet").read_bytes())
        assert (pipe.transformer._compiled_call_impl is not None) is compiled
    assert tables[0] == tables[1]


def test_the_result_of_torch_compile_in_place_of_the_network(pipe, schedule):
    with sodaprof.apply(pipe, schedule):
        wanted = short(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    for refused in (
        lambda: inspect_pipeline(pipe, "tiny", SHORT, 4.0, 1),
        lambda: sodaprof.apply(pipe, schedule),
    ):
        with pytest.raises(MismatchError, match=r"pipe\.transformer = pipe\.transformer\._orig_mod"):
            refused()
    pipe.transformer = pipe.transformer._orig_mod
    with sodaprof.apply(pipe, schedule):
        assert np.array_equal(short(pipe), wanted)
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        with pytest.raises(MismatchError, match=r"pipe\.transformer was replaced \(now OptimizedModule\)"):
            short(pipe)


def test_another_network_under_a_schedule(pipe, schedule):
    sodaprof.apply(pipe, schedule)
    pipe.transformer = tiny_pipe(layers=1, seed=3).transformer
    with pytest.raises(MismatchError, match=r"was replaced.*sodaprof\.remove\(pipe\), then apply"):
        short(pipe)
    sodaprof.remove(pipe)
    with sodaprof.apply(pipe, schedule) as handle:
        short(pipe)
        assert handle.report().executed == handle.report().planned


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_of_a_pipeline_under_a_schedule_are_plain(pipe, schedule, runtime, duplicate):
    plain = short(pipe)
    with sodaprof.apply(pipe, schedule, runtime=runtime) as handle:
        wanted = short(pipe)
        twin = duplicate(pipe)
        assert np.array_equal(short(twin), plain)
        assert np.array_equal(short(pipe), wanted)
        with sodaprof.apply(twin, schedule, runtime=runtime):
            assert np.array_equal(short(twin), wanted)
            assert np.array_equal(short(pipe), wanted)
        assert handle.report().executed == handle.report().planned
    assert np.array_equal(short(twin), plain)
    assert type(twin.scheduler) is type(pipe.scheduler)
