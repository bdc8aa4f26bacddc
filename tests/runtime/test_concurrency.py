"""Runs that overlap: each thread or task has its own, if each pipeline has a copy of the scheduler."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.errors import MismatchError
from tests.tiny_pipelines import FEW, SITES, TwoPassPipeline, clone, draw, schedule_for, tiny_pipe
from tests.updated import RESTING, updated

ROWS = {SITES[0]: "CRRCRRRC", SITES[3]: "CCRRCRCC"}


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
        assert not any(executor.moment.programs for executor in [*handle._executors.values()][1:])  # traced once


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


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
def test_an_aborted_call_within_another_has_no_effect_on_it(runtime):
    pipe = tiny_pipe()
    with sodaprof.apply(pipe, schedule_for(pipe, ROWS), runtime=runtime):
        alone, other, seen, scale = draw(pipe, (3,), seed=3), clone(pipe), [], pipe.scheduler.scale_model_input

        def abort(*args, **kwargs):
            seen.append(1)
            raise ZeroDivisionError

        def nested(*args, **kwargs):
            if not seen:
                step = type(other.scheduler).step
                other.transformer.register_forward_hook(abort)
                with pytest.raises(ZeroDivisionError):
                    draw(other, (5,), seed=5)
                other.transformer._forward_hooks.popitem()
                assert step is type(other.scheduler).step
            return scale(*args, **kwargs)

        pipe.scheduler.scale_model_input = nested
        assert np.array_equal(draw(pipe, (3,), seed=3), alone)
        del pipe.scheduler.scale_model_input
        with pytest.raises(MismatchError, match="outside a denoising loop"):
            pipe.transformer(torch.zeros(2, 4, 8, 8), timestep=torch.tensor([1]), class_labels=torch.tensor([1, 1]))


class InTurns(TwoPassPipeline):
    """A sampling loop that is a generator: it yields after its timesteps, between the branches and after each step."""

    @torch.no_grad()
    def __call__(self, label):
        x, labels = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(label)), torch.tensor([label])
        self.scheduler.set_timesteps(8)
        yield x
        for t in self.scheduler.timesteps:
            cond = self.transformer(x, timestep=t[None], class_labels=labels).sample
            yield x
            uncond = self.transformer(x, timestep=t[None], class_labels=torch.tensor([10])).sample
            x = self.scheduler.step(uncond + 4 * (cond - uncond), t, x).prev_sample
            yield x


def turns(*generators):
    """Returns the last latents of generators that take turns, in an order that is drawn."""
    order, found = np.random.default_rng(0), [None] * len(generators)
    going = list(range(len(generators)))
    while going:
        number = int(order.choice(going))
        latents = next(generators[number], None)
        if latents is None:
            going.remove(number)
        else:
            found[number] = latents
    return found


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
def test_generators_that_take_turns_in_one_thread(runtime):
    pipe = tiny_pipe(cls=InTurns)
    with sodaprof.apply(pipe, schedule_for(tiny_pipe(cls=TwoPassPipeline), ROWS), runtime=runtime) as handle:
        alone = [turns(pipe(label))[0] for label in (3, 5, 7)]
        for _ in range(3):
            found = turns(*(clone(pipe)(label) for label in (3, 5, 7)))
            assert all(map(torch.equal, found, alone))
        for _ in range(3):  # of aborted ones, each with a scheduler of its own, no executor is left
            begun, ended = clone(pipe)(3), clone(pipe)(5)
            next(begun), next(begun), next(ended), ended.close()
            assert torch.equal(turns(clone(pipe)(5))[0], alone[1])
            del begun, ended
            gc.collect()
        assert len(handle._executors) <= 5
        with pytest.raises(MismatchError, match="Another call of the pipeline began with this scheduler"):
            turns(pipe(3), pipe(5))


def test_a_copy_from_an_older_apply_is_told_to_be_made_anew():
    pipe = tiny_pipe()
    with sodaprof.apply(pipe, schedule_for(pipe, ROWS)):
        older = clone(pipe)
    with sodaprof.apply(pipe, schedule_for(pipe, ROWS)):
        with pytest.raises(MismatchError, match=r"no copy made of this one since the schedule was applied.*made anew"):
            draw(older)
        older.scheduler = copy.deepcopy(pipe.scheduler)
        assert np.array_equal(draw(older), draw(pipe))


def test_a_fitted_scheduler_that_a_nested_call_took_is_refused():
    pipe = tiny_pipe()
    pipe.scheduler = sodaprof.scheduler(updated(pipe, RESTING, stir=0.1))
    count, calls, scale = RESTING.count("."), [], pipe.scheduler.scale_model_input
    alone = draw(pipe, (3,), seed=3, steps=count)

    def nested(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            with pytest.raises(ZeroDivisionError):
                draw(pipe, (5,), seed=5, steps=count)
        elif len(calls) == 4:  # in the nested call, as far as the outer one is
            raise ZeroDivisionError
        return scale(*args, **kwargs)

    pipe.scheduler.scale_model_input = nested
    with pytest.raises(MismatchError, match="Another call of the pipeline began with this scheduler"):
        draw(pipe, (3,), seed=3, steps=count)
    del pipe.scheduler.scale_model_input
    assert np.array_equal(draw(pipe, (3,), seed=3, steps=count), alone)


def test_branches_that_change_places_within_a_run_are_refused():
    class Swapping(TwoPassPipeline):
        swapped = ()

        @torch.no_grad()
        def __call__(self, class_labels, num_inference_steps=50, **_):
            x, branches = torch.randn(1, 4, 8, 8), [torch.tensor(class_labels[:1]), torch.tensor([10])]
            self.scheduler.set_timesteps(num_inference_steps)
            for step, t in enumerate(self.scheduler.timesteps):
                order = branches[::-1] if step in self.swapped else branches
                out = [self.transformer(x, timestep=t[None], class_labels=labels).sample for labels in order]
                x = self.scheduler.step(out[0], t, x).prev_sample

    pipe = tiny_pipe(cls=Swapping)
    with sodaprof.apply(pipe, schedule_for(tiny_pipe(cls=TwoPassPipeline), ROWS)) as handle:
        pipe([3], 8)
        assert handle.report().complete
        pipe.swapped = (2,)
        with pytest.raises(MismatchError, match="Step 2 has another branch's arguments in network call 1"):
            pipe([3], 8)
