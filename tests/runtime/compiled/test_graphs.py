"""Graphs: replayed steps give the bits of the blocks, whatever changes between runs. A tape replaces CUDA graphs."""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.errors import MismatchError, SodaprofError
from sodaprof.formats.schedule import Forecast, TokenRule
from sodaprof.runtime.apply import Counters
from sodaprof.runtime.compiled import kernels, sums
from sodaprof.runtime.compiled.engine import Compiled
from sodaprof.runtime.compiled.graphs import CudaGraphs
from sodaprof.runtime.hooks.cells import slots_of
from tests.tape import Tapes
from tests.tiny_pipelines import (
    FEW,
    SITES,
    STEPS,
    TwoPassPipeline,
    draw,
    few,
    few_schedule,
    mixed_schedule,
    schedule_for,
    tiny_pipe,
    with_known_programs,
)


@pytest.fixture
def pipe():
    return tiny_pipe()


def by_hooks(pipe, schedule, *args, **kwargs):
    with sodaprof.apply(pipe, schedule):
        return draw(pipe, *args, **kwargs)


def captured(pipe, schedule, tapes, **settings):
    return with_known_programs(sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=tapes, **settings)))


def taylor_schedule(pipe):
    rows = dict.fromkeys(SITES, "CRCFFCRF")
    one, other = Forecast((2, 0), (1.5, -0.5)), Forecast((5, 2), (1.75, -0.75))
    return schedule_for(pipe, rows, forecasts=dict.fromkeys(SITES, (one, one, other)))


FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("make", "steps", "graphs", "mode", "dtype"),
    [
        (mixed_schedule, STEPS, 8, "ordered", FLOAT), (mixed_schedule, STEPS, 8, None, FLOAT),
        (taylor_schedule, STEPS, 5, "ordered", FLOAT), (taylor_schedule, STEPS, 5, None, FLOAT),
        (schedule_for, STEPS, 1, "ordered", FLOAT), (few_schedule, FEW, 4, "ordered", HALF),
    ],
)  # fmt: skip
def test_replayed_steps_are_bit_identical_to_the_hooks(make, steps, graphs, mode, dtype):
    pipe, tapes = tiny_pipe().to(dtype), Tapes()
    schedule = make(pipe)
    wanted = by_hooks(pipe, schedule, steps=steps)
    others = by_hooks(pipe, schedule, (7, 3), steps=steps, seed=5)
    with captured(pipe, schedule, tapes, sums=mode) as handle:
        for run in range(3):
            assert np.array_equal(draw(pipe, steps=steps), wanted), run
            assert handle.report().executed == handle.report().planned
        assert np.array_equal(draw(pipe, (7, 3), steps, seed=5), others)  # other labels and noise, the same graphs
        assert handle.report().executed == handle.report().planned
        assert np.array_equal(draw(pipe, steps=steps), wanted)
        assert handle.report().counters.graphs == graphs  # equal steps share one
        assert tapes.made == graphs + 1  # and one fills the tables
        # in the third run, a graph's first step is not replayed
        assert tapes.played == 2 * (steps + 1) + steps - graphs
        assert handle.report().path == f"compiled: {graphs} graphs, {steps}/{steps} steps replayed"


def test_two_pass_guidance():
    pipe, tapes = tiny_pipe(cls=TwoPassPipeline), Tapes()
    schedule = schedule_for(pipe, {SITES[1]: "CRRC", SITES[2]: "CRRR"}, steps=FEW)
    wanted = by_hooks(pipe, schedule, steps=FEW)
    with captured(pipe, schedule, tapes):
        for _ in range(4):
            assert np.array_equal(few(pipe), wanted)
        graphs = tapes.made - 2  # a branch has its own filling
        assert tapes.played == 2 * FEW - graphs + 2 * (FEW + 1)


def test_batch_sizes_in_turn_are_replayed(pipe):
    schedule, tapes = few_schedule(pipe), Tapes()
    two, one = by_hooks(pipe, schedule, steps=FEW), by_hooks(pipe, schedule, (4,), FEW)
    with captured(pipe, schedule, tapes):
        for run in range(4):
            for labels, wanted in (((1, 2), two), ((4,), one)):  # in turn, as requests come
                played = tapes.played
                assert np.array_equal(few(pipe, labels), wanted)
            assert (tapes.played - played == FEW + 1) == (run == 3)


def test_new_weights_count_in_place_and_elsewhere(pipe):
    schedule, tapes, other = few_schedule(pipe), Tapes(), tiny_pipe(seed=5)
    wanted = by_hooks(other, schedule, steps=FEW)
    with captured(pipe, schedule, tapes) as handle:
        for _ in range(4):
            few(pipe)
        made = tapes.made
        pipe.transformer.load_state_dict(other.transformer.state_dict())
        assert np.array_equal(few(pipe), wanted)
        assert tapes.made == made  # the same places
        pipe.transformer.load_state_dict(tiny_pipe().transformer.state_dict(), assign=True)
        few(pipe)
        assert tapes.made == 2 * made  # nothing is recorded or probed again
        pipe.transformer.load_state_dict(other.transformer.state_dict(), assign=True)
        assert np.array_equal(few(pipe), wanted)
        assert handle.report().path.startswith("compiled: ")


def test_an_exception_between_replays_and_a_swapped_schedule(pipe):
    schedule, tapes = few_schedule(pipe), Tapes()
    wanted = by_hooks(pipe, schedule, steps=FEW)
    with captured(pipe, schedule, tapes) as handle:
        few(pipe), few(pipe), few(pipe)
        step = pipe.scheduler.step

        def fails(*args, **kwargs):
            if handle.executor.moment.step == 2:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        pipe.scheduler.step = fails
        with pytest.raises(KeyboardInterrupt):
            few(pipe)
        pipe.scheduler.step = step
        assert np.array_equal(few(pipe), wanted)
    second = schedule_for(pipe, {SITES[0]: "CRRR"}, steps=FEW)
    expected = by_hooks(pipe, second, steps=FEW)
    with captured(pipe, second, Tapes()):
        few(pipe), few(pipe), few(pipe)
        assert np.array_equal(few(pipe), expected)
    with handle:
        assert np.array_equal(few(pipe), wanted)


def test_two_pipelines_at_once(pipe):
    other = tiny_pipe(seed=9)
    schedules = few_schedule(pipe), taylor_schedule(other)
    wanted = by_hooks(pipe, schedules[0], steps=FEW), by_hooks(other, schedules[1])
    tapes = Tapes()
    with captured(pipe, schedules[0], tapes), captured(other, schedules[1], tapes):
        for _ in range(4):
            assert np.array_equal(few(pipe), wanted[0])
            assert np.array_equal(draw(other), wanted[1])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("not permitted")])
def test_a_failed_capture_runs_the_blocks_and_is_reported(pipe, error):
    schedule = few_schedule(pipe)
    wanted = by_hooks(pipe, schedule, steps=FEW)
    with captured(pipe, schedule, Tapes(error)) as handle:
        for _ in range(4):
            assert np.array_equal(few(pipe), wanted)
            assert handle.report().executed == handle.report().planned
        assert handle.report().path == f"compiled, no CUDA graphs: the capture failed ({error})"


def test_outputs_that_a_pipeline_keeps_are_not_overwritten(pipe):
    schedule, kept = schedule_for(pipe, steps=FEW), []  # one graph, replayed at every step
    with captured(pipe, schedule, Tapes()):
        few(pipe), few(pipe), few(pipe)
        hook = pipe.transformer.register_forward_hook(lambda m, a, out: kept.append(out[0]))
        few(pipe)
        hook.remove()
    assert len({t.data_ptr() for t in kept}) == FEW


def test_without_a_gpu_the_blocks_run_and_the_report_says_why(pipe):
    schedule = few_schedule(pipe)
    wanted = by_hooks(pipe, schedule, steps=FEW)
    with captured(pipe, schedule, True) as handle:
        few(pipe)
        assert np.array_equal(few(pipe), wanted)
        assert handle.report().path == "compiled, no CUDA graphs: the pipeline was on cpu when the schedule was applied"
    with pytest.raises(SodaprofError, match='apply\\(pipe, schedule, runtime="compiled"\\)'):
        sodaprof.apply(pipe, schedule, capture=True)


def test_random_token_scores_are_not_captured(pipe):
    rule = TokenRule("random", seed=3)
    schedule = schedule_for(pipe, {SITES[3]: "CPRR"}, {SITES[3]: (3,)}, rule=rule, steps=FEW)
    wanted = by_hooks(pipe, schedule, steps=FEW)
    with captured(pipe, schedule, Tapes()) as handle:
        for _ in range(3):
            assert np.array_equal(few(pipe), wanted)
        assert "drawn on the host" in handle.report().path


@pytest.mark.skipif(
    not (kernels.available() and os.environ.get("TRITON_INTERPRET")),
    reason="needs triton and TRITON_INTERPRET=1, or a GPU",
)
@pytest.mark.parametrize("mode", ["ordered", "fused"])
def test_the_kernel_sums_from_the_arena(monkeypatch, mode):
    pipe = tiny_pipe(layers=4)
    schedule = schedule_for(
        pipe, {f"transformer_blocks.{i}.{m}": "CRRCRRRC" for i in range(4) for m in ("attn1", "ff")}
    )
    wanted = by_hooks(pipe, schedule)
    monkeypatch.setattr(sums, "on_gpu", lambda tensor: True)
    with captured(pipe, schedule, Tapes(RuntimeError("no graphs here")), sums=mode) as handle:
        draw(pipe), draw(pipe)
        pictures = draw(pipe)
        counters = handle.report().counters
    assert counters.kernel_sums == counters.sums == 5  # one launch for each cached step
    assert counters.blocks_from_tables == 3 * 4  # the others
    assert np.array_equal(pictures, wanted) if mode == "ordered" else np.allclose(pictures, wanted, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [mixed_schedule, taylor_schedule, schedule_for])
def test_cuda_graphs_replay_what_the_blocks_compute(make, dtype):
    pipe = tiny_pipe().to("cuda", dtype)
    schedule = make(pipe)
    with sodaprof.apply(pipe, schedule, runtime="compiled"):
        draw(pipe)
        wanted, others = draw(pipe), draw(pipe, (7, 3), seed=5)
    with sodaprof.apply(pipe, schedule, runtime="compiled") as handle:
        for _ in range(4):
            assert np.array_equal(draw(pipe), wanted)
        assert np.array_equal(draw(pipe, (7, 3), seed=5), others)
        assert np.array_equal(draw(pipe), wanted)
        counters = handle.report().counters
        assert counters.graphs > 0
        assert counters.replays == counters.steps_replayed == STEPS


def test_graphs_after_dropped_ones_get_a_new_pool(monkeypatch):
    captures = []

    @contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        captures.append((pool, stream))
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", recording)
    graphs = CudaGraphs()
    graphs.capture(int), graphs.capture(int)
    graphs.forget()
    graphs.capture(int)
    first, second, third = captures
    assert first == second
    assert third[0] is not first[0]
    assert third[1] is not first[1]


def test_counters_of_each_runtime(pipe):
    schedule, tapes = few_schedule(pipe), Tapes()
    with sodaprof.apply(pipe, schedule) as handle:
        few(pipe)
        assert not any(vars(handle.report().counters).values())
    with sodaprof.apply(pipe, schedule, runtime="compiled") as handle:
        few(pipe)
        traced = handle.report().counters.programs
        assert handle.report().counters == Counters(0, 0, 0, 0, 0, 0, traced)
        few(pipe), few(pipe)  # the last step is a sum over both blocks
        assert handle.report().counters == Counters(2 * (FEW - 1), 1, 0, 0, 0, 0, traced)
    with captured(pipe, schedule, tapes) as handle:
        few(pipe), few(pipe), few(pipe)
        assert handle.report().counters == Counters(
            2 * (FEW - 1), 1, 0, FEW, 0, 0, 0
        )  # a graph's first step is not replayed
        few(pipe)
        assert handle.report().counters == Counters(2 * (FEW - 1), 1, 0, FEW, FEW, FEW, 0)


def test_sources_share_as_few_slots_as_possible():
    assert slots_of({0: 4, 2: 7, 5: 7, 6: 9}) == {0: 0, 2: 1, 5: 0, 6: 2}


@pytest.mark.parametrize("extra", [{}, {"whole_steps": True}])
def test_another_resolution_is_refused_and_the_profiled_one_still_runs(extra):
    pipe, tapes = tiny_pipe(cls=TwoPassPipeline), Tapes()
    schedule = schedule_for(pipe, {SITES[1]: "CRRC", SITES[2]: "CRRR"}, steps=FEW)
    wanted = by_hooks(pipe, schedule, steps=FEW)
    with captured(pipe, schedule, tapes, **extra) as handle:
        few(pipe), few(pipe), few(pipe)
        larger = pipe.transformer.register_forward_pre_hook(
            lambda m, args, kwargs: ((args[0].repeat(1, 1, 2, 2), *args[1:]), kwargs), with_kwargs=True
        )
        with pytest.raises(MismatchError, match="64 tokens here, 16 in the schedule"):
            few(pipe)
        larger.remove()
        assert np.allclose(few(pipe), wanted, atol=2e-5)
        assert handle.report().executed == handle.report().planned
