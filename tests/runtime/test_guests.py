"""Runs that overlap, are interrupted or are copied: a sample of the matrix in `tests/zoo/zoo_guests.py`, and what they keep."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.errors import MismatchError
from sodaprof.runtime.executor import Executor
from tests.tiny_pipelines import (
    SHORT,
    clone,
    draw,
    mixed_schedule,
    schedule_for,
    short_schedule,
    tiny_pipe,
    with_known_programs,
)
from tests.updated import with_update
from tests.zoo.zoo_guests import CALLED, Host, Interrupted, at_once, check, in_turn


@pytest.mark.parametrize("guest", ["deepcopy", "interleaved runs", "callbacks", "interrupt"])
@pytest.mark.parametrize("runtime", ["hooks", "scheduler"])
def test_a_sample_of_the_matrix(guest, runtime):
    result, notes = check("FluxPipeline", guest, runtime)
    assert result in ("right", "right; refused"), notes
    assert guest == "interleaved runs" or not notes


@pytest.fixture
def host():
    return Host("FluxPipeline", "hooks")


def fitted_schedule(pipe):
    schedule = schedule_for(pipe, steps=SHORT)
    pipe.scheduler.set_timesteps(SHORT)
    return with_update(pipe, schedule, ".-.", stir=0.2)


def alone(host):
    return {entry: host.draw(entry) for entry in (7, 8)}


def are_right(host, wanted, pipes):
    found = at_once(host, list(zip(pipes, wanted, strict=True)))
    assert all(torch.equal(one, two) for one, two in zip(found, wanted.values(), strict=True))


@pytest.mark.parametrize("fitted", [False, True])
def test_two_threads_with_copied_schedulers(host, fitted):
    schedule = with_update(host.pipe, host.computed, CALLED, stir=0.2) if fitted else host.reusing
    with host.under(schedule):
        wanted = alone(host)
        for pipe in (host.clone(), host.pipe):
            are_right(host, wanted, [pipe, host.clone()])


@pytest.mark.parametrize("make", [short_schedule, fitted_schedule])
def test_two_threads_with_copied_schedulers_under_compiled(make):
    pipe = tiny_pipe(layers=1)
    schedule = make(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = [draw(pipe, steps=schedule.steps, seed=seed) for seed in (0, 1)]
    current = threading.local()
    pipe.transformer.register_forward_pre_hook(lambda *_: getattr(current, "passes", lambda: None)())

    def drawn(passes, pipe, seed):
        current.passes = passes
        return torch.as_tensor(draw(pipe, steps=schedule.steps, seed=seed))

    with with_known_programs(sodaprof.apply(pipe, schedule, runtime="compiled")):
        for _ in range(3):  # traced, with tables made, with tables
            calls = [partial(drawn, pipe=clone(pipe), seed=seed) for seed in (0, 1)]
            assert all(np.array_equal(*pair) for pair in zip(in_turn(calls), wanted, strict=True))


def test_a_run_within_another_runs_callback(host):
    with host.under(host.reusing):
        wanted, other, inner = alone(host), host.clone(), []

        def draws(pipe, step, latents):
            if step in (0, 3):
                inner.append(host.draw(8, other))

        assert torch.equal(host.draw(7, **host.on_step(draws)), wanted[7])
        assert all(torch.equal(picture, wanted[8]) for picture in inner)


def test_a_run_that_is_aborted_in_a_thread_and_those_after_it(host):
    def raises(pipe, step, latents):
        if step == 2:
            raise Interrupted

    with host.under(host.reusing):
        wanted, other = alone(host), host.clone()
        for pipe in (other, host.pipe):
            (raised,) = in_turn([lambda _, pipe=pipe: host.draw(pipe=pipe, **host.on_step(raises))])
            assert isinstance(raised, Interrupted)
            are_right(host, wanted, [host.pipe, other])
            assert torch.equal(host.draw(7), wanted[7])


def test_of_two_threads_with_one_scheduler_the_first_is_refused_with_true_words(host):
    with host.under(host.reusing):
        wanted = alone(host)
        first, second = at_once(host, [(host.pipe, 7), (host.pipe, 8)])
        assert isinstance(first, MismatchError)
        assert str(first).startswith("Another call of the pipeline began with this scheduler while this one ran")
        assert torch.equal(second, wanted[8])
        are_right(host, wanted, [host.pipe, host.clone()])  # as the message advises


def test_copies_of_the_scheduler_are_plain_after_remove(host):
    with host.under(host.reusing):
        clones = [host.clone(), host.clone()]
        assert torch.equal(host.draw(pipe=clones[0]), host.alone)
    for pipe in (*clones, host.clone()):
        assert torch.equal(host.draw(pipe=pipe), host.plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_of_a_pipeline_under_a_schedule_are_plain(copied):
    pipe = tiny_pipe()
    plain = draw(pipe)
    with sodaprof.apply(pipe, mixed_schedule(pipe)):
        scheduled, made = draw(pipe), copied(pipe)
        made.set_progress_bar_config(disable=True)
        assert (draw(made) == plain).all()
        with sodaprof.apply(made, mixed_schedule(tiny_pipe())):
            assert (draw(made) == scheduled).all()
        assert (draw(pipe) == scheduled).all()
    assert (draw(pipe) == plain).all()


def held():
    """Executors, and bytes of tensors that are no weights."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not isinstance(o, torch.nn.Parameter)]
    return sum(type(o) is Executor for o in gc.get_objects()), sum(t.numel() * t.element_size() for t in tensors)


def test_ended_runs_keep_no_caches_and_aborted_ones_none_once_their_pipeline_is_gone(host):
    def raises(pipe, step, latents):
        if step == 3:
            raise Interrupted

    with host.under(host.reusing):
        wanted = alone(host)
        are_right(host, wanted, [host.pipe, host.clone()])
        executors, size = held()
        for _ in range(3):
            are_right(host, wanted, [host.clone(), host.clone()])
            in_turn([lambda _: host.draw(pipe=host.clone(), **host.on_step(raises))])
            gc.collect()  # the exception holds the pipeline
        are_right(host, wanted, [host.clone(), host.clone()])
        after = held()
        assert after[0] <= executors + 1
        assert after[1] <= size
