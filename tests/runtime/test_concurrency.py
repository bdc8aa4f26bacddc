"""Runs that overlap: each thread or task has its own, if each pipeline has a copy of the scheduler."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

import sodaprof
from sodaprof.errors import MismatchError
from tests.tiny_pipelines import FEW, SITES, draw, schedule_for, tiny_pipe
from tests.updated import RESTING, updated

ROWS = {SITES[0]: "CRRCRRRC", SITES[3]: "CCRRCRCC"}


def clone(pipe):
    """Another pipeline with the same network and a copy of the scheduler, as servers make one for each request."""
    made = type(pipe)(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
    made.set_progress_bar_config(disable=True)
    return made


def in_turn(pipes, labels):
    """Returns what the pipelines draw in threads of their own, one step of each in turn."""
    count, barrier = len(pipes), threading.Barrier(len(pipes))
    found = [None] * count

    def run(i):
        scale = pipes[i].scheduler.scale_model_input

        def wait(*args, **kwargs):
            barrier.wait(60)
            return scale(*args, **kwargs)

        pipes[i].scheduler.scale_model_input = wait
        found[i] = draw(pipes[i], (labels[i],), seed=labels[i])
        del pipes[i].scheduler.scale_model_input

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
@pytest.mark.parametrize("kind", ["rows", "update"])
def test_runs_that_overlap_are_each_right(runtime, kind):
    pipe = tiny_pipe()
    schedule = schedule_for(pipe, ROWS) if kind == "rows" else updated(pipe, RESTING, stir=0.1)
    with sodaprof.apply(pipe, schedule, runtime=runtime) as handle:
        alone = [draw(pipe, (label,), seed=label) for label in (3, 5, 7)]
        for _ in range(3):
            found = in_turn([pipe, clone(pipe), clone(pipe)], (3, 5, 7))
            assert all(map(np.array_equal, found, alone))
        assert handle.report().executed == handle.report().planned


def test_a_run_within_a_callback_of_another_is_right():
    pipe = tiny_pipe()
    with sodaprof.apply(pipe, schedule_for(pipe, ROWS)):
        outer, inner = draw(pipe, (3,), seed=3), draw(pipe, (5,), seed=5)
        other, seen, step = clone(pipe), [], pipe.scheduler.step

        def nested(*args, **kwargs):
            if len(seen) < 2:
                seen.append(draw(other, (5,), seed=5))
            return step(*args, **kwargs)

        pipe.scheduler.step = nested
        assert np.array_equal(draw(pipe, (3,), seed=3), outer)
        assert all(np.array_equal(picture, inner) for picture in seen)
        del pipe.scheduler.step


def test_aborted_runs_leave_nothing_to_others():
    pipe = tiny_pipe()
    with sodaprof.apply(pipe, schedule_for(pipe, ROWS)) as handle:
        alone = draw(pipe, (3,), seed=3)

        def abort():
            broken = clone(pipe)
            broken.scheduler.scale_model_input = lambda *args: 1 / 0
            with pytest.raises(ZeroDivisionError):
                draw(broken, (5,), seed=5)

        for _ in range(4):
            thread = threading.Thread(target=abort)
            thread.start()
            thread.join()
            gc.collect()
            assert np.array_equal(draw(pipe, (3,), seed=3), alone)
        assert len(handle._executors) <= 2


def test_the_call_that_loses_its_scheduler_to_another_thread_is_refused():
    pipe = tiny_pipe()
    with sodaprof.apply(pipe, schedule_for(pipe, ROWS)):
        alone, step, pictures, count = draw(pipe, (5,), seed=5), pipe.scheduler.step, [], []

        def interrupt(*args, **kwargs):
            count.append(1)
            if len(count) == 2:
                other = threading.Thread(target=lambda: pictures.append(draw(pipe, (5,), seed=5)))
                other.start()
                other.join()
            return step(*args, **kwargs)

        pipe.scheduler.step = interrupt
        with pytest.raises(MismatchError, match="Another call of the pipeline began with this scheduler"):
            draw(pipe, (3,), seed=3)
        del pipe.scheduler.step
        assert np.array_equal(pictures[0], alone)


def test_copies_are_plain_after_removal_and_copied_or_pickled_pipelines_always():
    pipe = tiny_pipe()
    plain = draw(pipe)
    handle = sodaprof.apply(pipe, schedule_for(pipe, ROWS))
    scheduled, other = draw(pipe), clone(pipe)
    copied, loaded = copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe.transformer))
    assert np.array_equal(draw(copied), plain)
    assert not any(isinstance(vars(m).get("forward"), type(pipe.transformer.forward)) for m in loaded.modules())
    assert np.array_equal(draw(other), scheduled)
    assert not np.array_equal(scheduled, plain)
    assert type(pickle.loads(pickle.dumps(pipe.scheduler))) is type(copied.scheduler)
    sodaprof.remove(pipe)
    assert np.array_equal(draw(other), plain)
    assert np.array_equal(draw(pipe), plain)
    with handle:
        assert np.array_equal(draw(pipe), scheduled)


def test_a_removed_schedule_keeps_no_network_alive():
    pipe = tiny_pipe()
    with sodaprof.apply(pipe, schedule_for(pipe, ROWS)):
        draw(pipe)
    network = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert network() is None


def test_threads_that_begin_at_the_same_moment_have_executors_of_their_own():
    pipe = tiny_pipe(layers=1)
    schedule = schedule_for(pipe, steps=FEW)
    with sodaprof.apply(pipe, schedule) as handle:
        pipes = [clone(pipe) for _ in range(4)]
        alone = [draw(pipe, (i,), seed=i, steps=FEW) for i in range(4)]
        found, start = [None] * 4, threading.Barrier(4)

        def run(i):
            start.wait(60)
            found[i] = draw(pipes[i], (i,), seed=i, steps=FEW)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(map(np.array_equal, found, alone))
        assert len(handle._executors) <= 4 + 1
