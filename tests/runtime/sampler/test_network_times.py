"""Schedules of version 2: what the network receives and the sums of the latents are as the schedule says, in each runtime."""

from __future__ import annotations

import copy
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from msgspec.structs import replace

import sodaprof
from sodaprof.errors import MismatchError, UnsupportedModelError
from sodaprof.formats.sampler import rounded
from sodaprof.formats.schedule import Schedule
from sodaprof.pipelines import transformer_hook
from sodaprof.pipelines.patch import patched
from sodaprof.pipelines.sampler_steps import own_update
from sodaprof.pipelines.transformer_hook import is_whole_of
from tests.runtime.sampler.test_scheduler import inspected
from tests.tape import runtime as runtime_of
from tests.tiny_flux import STEPS as FLUX_STEPS
from tests.tiny_flux import draw as draw_flux
from tests.tiny_flux import flux_call, flux_pipe
from tests.tiny_pipelines import STEPS, TwoPassPipeline, mixed_schedule, tiny_pipe, with_known_programs
from tests.two_transformers import draw as draw_wan
from tests.two_transformers import schedule_of, small_wan
from tests.updated import CALLED, RESTING, apart, pipe_of, sample, updated, with_update

RUNTIMES = ("hooks", "compiled", "graphs", "whole-steps")
SHIFTS = (-2.25, 1.5, 0.75)  # of the times, in turn


def with_times(schedule: Schedule, shifts: tuple[float, ...] = SHIFTS) -> Schedule:
    """Returns the schedule with network times that differ from the sampler's at each step that calls a network."""
    called = [any(plan.stack[t] in ".S" for plan in schedule.transformers.values()) for t in range(schedule.steps)]
    own = schedule.sampler.timesteps
    shifted = [t + s if 0 <= t + s < 1000 else t - s for t, s in zip(own, itertools.cycle(shifts), strict=False)]
    times = tuple(new if calls else t for t, new, calls in zip(own, shifted, called, strict=True))
    return replace(schedule, update=replace(schedule.update, times=times))


def received(pipe, draw) -> list[float]:
    """Returns the timesteps that the pipeline calls the network with; at steps without a call its hook returns at once."""
    seen = []

    def note(module, args, kwargs):
        seen.append(float(kwargs["timestep"].reshape(-1)[0]))

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    draw()
    handle.remove()
    return seen


def called_times(schedule: Schedule) -> list[float]:
    """Returns the times at which the schedule calls the network, rounded as tensors hold them."""
    stack = schedule.transformers["transformer"].stack
    return torch.tensor([float(t) for t, a in zip(schedule.times, stack, strict=True) if a != "-"]).tolist()


# ---- network times --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm", "unipc", "euler", "flow", "rectified"])
def test_the_network_receives_the_times(sampler):
    pipe = pipe_of(TwoPassPipeline, sampler)
    plain, schedule = sample(pipe), with_times(updated(pipe, RESTING, stir=0.1), (-2.25, -1.5))
    own = pipe.scheduler
    with sodaprof.apply(pipe, replace(schedule, update=replace(schedule.update, times=None))):
        untimed = sample(pipe)
    with sodaprof.apply(pipe, schedule) as handle:
        seen = received(pipe, lambda: sample(pipe))
        wanted = sample(pipe)
        assert handle.report().executed == handle.report().planned
        assert own.timesteps.tolist() == list(schedule.sampler.timesteps)  # between runs it has its own
    assert seen[::2] == torch.tensor(schedule.times, dtype=torch.float32).tolist()
    assert apart(wanted, untimed) > 1e-4
    pipe.scheduler = sodaprof.scheduler(schedule)
    assert received(pipe, lambda: sample(pipe, steps=CALLED))[::2] == called_times(schedule)
    assert apart(sample(pipe, steps=CALLED), wanted) < 2e-6
    pipe.scheduler = own
    assert np.array_equal(sample(pipe), plain)


@pytest.mark.parametrize("cls", [DiTPipeline, TwoPassPipeline])
def test_runtimes_agree_on_times_and_first_latents(cls, tmp_path):
    pipe = pipe_of(cls, "ddpm" if cls is TwoPassPipeline else "ddim", layers=1)
    schedule = with_times(updated(pipe, RESTING, history=6, stir=0.1))
    initial = tuple(float(f"{value:.3g}") for value in np.linspace(-0.2, 0.3, STEPS))
    schedule = replace(schedule, update=replace(schedule.update, initial=initial))
    schedule.save(tmp_path / "schedule.json")
    with sodaprof.apply(pipe, tmp_path / "schedule.json"):
        wanted, others = sample(pipe), sample(pipe, (7, 3), seed=5)
    check_runtimes(pipe, schedule, lambda: sample(pipe), wanted)
    pipe.scheduler = sodaprof.scheduler(schedule)
    assert apart(sample(pipe, steps=CALLED), wanted) < 2e-6
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = type(pipe.scheduler).from_pretrained(tmp_path / "scheduler")
    for again in (loaded, copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        pipe.scheduler = again
        assert apart(sample(pipe, steps=CALLED), wanted) < 2e-6
        assert apart(sample(pipe, (7, 3), seed=5, steps=CALLED), others) < 2e-6


def test_the_sums_have_the_first_latents_and_eight_outputs():
    pipe, seen = pipe_of(), []
    schedule = updated(pipe, history=8, stir=0.1)
    initial = (0.25, 0.0, -0.1, 0.0, 0.3, 0.0, 0.0, 0.05)
    schedule = replace(schedule, update=replace(schedule.update, initial=initial))

    def note(step, output, t, x, *args, **kwargs):
        result = step(output, t, x, *args, **kwargs)
        seen.append((output.double(), x.double(), result.prev_sample))
        x.zero_()  # a pipeline may overwrite its tensor
        return result

    with sodaprof.apply(pipe, schedule) as handle:
        with patched(pipe.scheduler, "step", note):
            sample(pipe)
        assert handle.executor.update.ring.first is None  # nothing is kept between pictures
    outputs = []
    for t, (output, x, found) in enumerate(seen):
        outputs.insert(0, output)
        own, *weights = schedule.update.coefficients[t]
        wanted = own * x + sum(c * v for c, v in zip(weights, outputs, strict=False)) + initial[t] * seen[0][1]
        assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert len(outputs) == STEPS
    assert any(row[8] for row in schedule.update.coefficients)


def check_runtimes(pipe, schedule, draw, wanted):
    """Three runs in each runtime give the wanted latents; the compiled ones those of the hooks bit for bit."""
    paths = []
    for runtime in RUNTIMES:
        with with_known_programs(sodaprof.apply(pipe, schedule, runtime=runtime_of(runtime))) as handle:
            for _ in range(3):
                found = np.asarray(draw())
                assert apart(found, wanted) < 1e-5
                assert runtime == "whole-steps" or np.array_equal(found, wanted)
                assert handle.report().executed == handle.report().planned
            paths.append(handle.report())
    assert paths[1].counters.blocks_from_tables > 0
    assert "whole steps" in paths[-1].path


def test_runtimes_agree_on_flux():
    """Flow matching, whose pipeline gives the network t / 1000."""
    pipe = flux_pipe()
    whole = inspected(pipe, FLUX_STEPS, own=flux_call(pipe))
    schedule = with_times(with_update(pipe, whole, "..-.-.", stir=0.1), (-2.25, -1.5))
    schedule = replace(schedule, update=replace(schedule.update, initial=(0.0, 0.05, 0.0, -0.1, 0.0, 0.02)))
    with sodaprof.apply(pipe, schedule):
        seen = received(pipe, lambda: draw_flux(pipe))
        wanted = draw_flux(pipe).numpy()
    assert np.allclose(seen, np.array(schedule.times) / 1000, rtol=1e-6)
    check_runtimes(pipe, schedule, lambda: draw_flux(pipe), wanted)


def test_times_go_with_cells_that_reuse():
    pipe = pipe_of(layers=2)
    schedule = mixed_schedule(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    timed = with_times(with_update(pipe, schedule))
    with sodaprof.apply(pipe, timed):
        wanted = sample(pipe)
    with with_known_programs(sodaprof.apply(pipe, timed, runtime="compiled")) as handle:
        for _ in range(3):
            assert np.array_equal(sample(pipe), wanted)
        assert handle.report().counters.blocks_from_tables > 0


def test_an_aborted_run_leaves_the_schedulers_timesteps_after_remove():
    pipe = pipe_of()
    plain, schedule, count = sample(pipe), with_times(updated(pipe, RESTING)), iter(range(STEPS))

    def fail(step, *args, **kwargs):
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    handle = sodaprof.apply(pipe, schedule)
    with patched(pipe.scheduler, "step", fail), pytest.raises(KeyboardInterrupt):
        sample(pipe)
    assert pipe.scheduler.timesteps.is_floating_point()
    handle.remove()
    assert pipe.scheduler.timesteps.tolist() == list(schedule.sampler.timesteps)
    assert np.array_equal(sample(pipe), plain)


def test_a_partial_trajectory_is_refused():
    class Late(TwoPassPipeline):
        @torch.no_grad()
        def __call__(self, class_labels, num_inference_steps=50, **_):
            x, labels = torch.randn(1, 4, 8, 8), torch.tensor(class_labels[:1])
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps[1:]:
                for _branch in range(2):
                    out = self.transformer(x, timestep=t[None], class_labels=labels).sample
                x = self.scheduler.step(out, t, x).prev_sample

    for sampler in ("ddim", "dpm"):
        schedule = with_times(updated(pipe_of(TwoPassPipeline, sampler), "........"))
        pipe = pipe_of(Late, sampler)
        with sodaprof.apply(pipe, schedule), pytest.raises(MismatchError, match="does not run all timesteps"):
            pipe([1], num_inference_steps=STEPS)


# ---- noise ------------------------------------------------------------------------------------------------------------

ALL = ["ddim", "ddpm", "dpm", "unipc", "euler", "flow", "rectified"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sampler", ALL)
def test_noise_at_a_network_time_is_that_of_its_step(sampler, whole):
    pipe = pipe_of(TwoPassPipeline, sampler)
    schedule = with_times(updated(pipe, RESTING), (-2.25, -1.5))
    if whole:  # numbers that a file holds as integers
        times = tuple(t if t == o else int(t) for t, o in zip(schedule.times, schedule.sampler.timesteps, strict=True))
        schedule = replace(schedule, update=replace(schedule.update, times=times))
    own, jump, x, noise = pipe.scheduler, sodaprof.scheduler(schedule), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    own.set_timesteps(STEPS)

    def noised(scheduler, t):
        given = {"scale_noise": (x, t, noise)} if sampler == "flow" else {"add_noise": (x, noise, t)}
        return next(getattr(scheduler, name)(*arguments) for name, arguments in given.items())

    wanted = [noised(own, t.repeat(2)) for t in own.timesteps]
    called = [step for step, action in enumerate(schedule.transformers["transformer"].stack) if action == "."]
    pair = (called[1], called[3])
    mixed = noised(own, own.timesteps[list(pair)])
    jump.set_timesteps(CALLED)
    for step, t in zip(called, jump.timesteps, strict=True):
        assert torch.equal(noised(jump, t.repeat(2)), wanted[step])
    assert torch.equal(noised(jump, jump.timesteps[[1, 3]]), mixed)
    with sodaprof.apply(pipe, schedule):
        assert torch.equal(noised(own, own.timesteps[:1].repeat(2)), wanted[0])  # no run: its own timesteps
        for scheduler in (own, copy.deepcopy(own)):
            scheduler.set_timesteps(STEPS)
            assert scheduler.timesteps.tolist() != list(schedule.sampler.timesteps)
            for step, t in enumerate(scheduler.timesteps):
                assert torch.equal(noised(scheduler, t.repeat(2)), wanted[step])
            assert torch.equal(noised(scheduler, scheduler.timesteps[list(pair)]), mixed)
    own.set_timesteps(STEPS)
    assert torch.equal(noised(own, own.timesteps[:1].repeat(2)), wanted[0])


def test_noise_is_added_by_keyword_and_at_timesteps_of_no_step_as_before():
    pipe = pipe_of(TwoPassPipeline)
    schedule = with_times(updated(pipe, RESTING))
    own, jump, x, noise = pipe.scheduler, sodaprof.scheduler(schedule), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    other = torch.tensor([123, 456])
    wanted, first = own.add_noise(x, noise, other), own.add_noise(x, noise, own.timesteps[:1])
    assert torch.equal(jump.add_noise(x, noise, timesteps=jump.timesteps[:1]), first)
    assert torch.equal(jump.add_noise(x, noise, other), wanted)
    with pytest.raises(IndexError):  # no fraction is rounded without a word
        jump.add_noise(x, noise, torch.tensor([123.25]))
    with sodaprof.apply(pipe, schedule):
        own.set_timesteps(STEPS)
        assert torch.equal(own.add_noise(x, timesteps=own.timesteps[:1], noise=noise), first)
        assert torch.equal(own.add_noise(x, noise, other), wanted)


# ---- times that do not reach the network ----------------------------------------------------------------------------


class Whole(TwoPassPipeline):
    """A pipeline that gives its network whole timesteps."""

    as_network = staticmethod(lambda t: t.long())

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=50, **_):
        x, labels = torch.randn(1, 4, 8, 8), torch.tensor(class_labels[:1])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            for _branch in range(2):
                time = type(self).as_network(t)
                out = self.transformer(x, timestep=time[None], class_labels=labels).sample
            x = self.scheduler.step(out, t, x).prev_sample


@pytest.mark.parametrize(
    ("convert", "refused"),
    [
        (lambda t: t.long(), True),
        (lambda t: t.float().round(), True),
        (lambda t: t.float().floor(), True),
        (lambda t: t, False),
        (lambda t: t.to(torch.bfloat16), False),
        (lambda t: t.to(torch.bfloat16).float(), False),
    ],
)
def test_a_pipeline_that_truncates_times_is_refused_by_name(convert, refused):
    schedule = with_times(updated(pipe_of(TwoPassPipeline), RESTING), (-2.0, 1.4))
    pipe = tiny_pipe(cls=type("Converts", (Whole,), {"as_network": staticmethod(convert)}))
    with sodaprof.apply(pipe, schedule):
        for _ in range(2):
            if refused:
                with pytest.raises(
                    UnsupportedModelError, match=r"transformer with the timestep .*whole timesteps alone"
                ):
                    pipe([1], num_inference_steps=STEPS)
            else:
                pipe([1], num_inference_steps=STEPS)
    with sodaprof.apply(pipe, replace(schedule, update=replace(schedule.update, times=None))):
        pipe([1], num_inference_steps=STEPS)  # whole timesteps arrive whole


@pytest.mark.parametrize(
    ("convert", "asked"), [(lambda t: t, 1), (lambda t: t.to(torch.bfloat16).float(), 2 * (STEPS - 1))]
)
def test_the_network_is_asked_in_one_run_at_most(convert, asked, monkeypatch):
    pipe, count = tiny_pipe(cls=type("Converts", (Whole,), {"as_network": staticmethod(convert)})), []
    schedule = updated(pipe_of(TwoPassPipeline), "." * STEPS)
    *most, last = schedule.sampler.timesteps
    near = [torch.tensor(t).to(torch.bfloat16).item() + 0.25 for t in most]  # which bf16 rounds to whole numbers
    schedule = replace(schedule, update=replace(schedule.update, times=(*near, last)))
    monkeypatch.setattr(transformer_hook, "is_whole_of", lambda *a: (count.append(a), is_whole_of(*a))[1])
    with sodaprof.apply(pipe, schedule):
        for _ in range(3):
            pipe([1], num_inference_steps=STEPS)
            assert len(count) == asked


@pytest.mark.parametrize("of", [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000, lambda t: 1000 - t])
@pytest.mark.parametrize("time", [986.3, 701.7, 20.4, 3.5])
def test_a_truncated_time_is_known_through_the_maps_of_pipelines(of, time):
    t = torch.tensor(time)
    assert is_whole_of(time, of(t.round()), {})
    assert is_whole_of(time, of(t.floor()), {"num_train_timesteps": 1000})
    assert is_whole_of(time, t.long(), {})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not is_whole_of(time, of(t.to(dtype)), {})
        assert not is_whole_of(time, of(t.to(dtype).float()), {})
        assert not is_whole_of(time, of(t).to(dtype), {})
    assert not is_whole_of(time, t.log(), {})  # a map that is not known
    for exact in (of(torch.tensor(987.6)), of(torch.tensor(987.5))):  # bf16 has 988 for this time, and this is none
        assert is_whole_of(987.6, exact, {}) is False
    assert is_whole_of(987.6, of(torch.tensor(988.0)), {}) is None  # bf16 has 988 as well
    assert is_whole_of(987.6, of(torch.tensor(987.0)), {}) is True  # no half precision has 987


# ---- two transformers -----------------------------------------------------------------------------------------------


def test_times_stay_on_their_side_of_the_boundary():
    wan = small_wan()
    schedule = schedule_of(wan)
    timed = with_times(replace(schedule, update=with_update(wan, schedule).update), (-1.5, -0.75))
    with sodaprof.apply(wan, timed) as handle:
        found = draw_wan(wan)
        assert handle.report().executed == handle.report().planned
    assert not torch.equal(found, draw_wan(wan))
    times, below = list(timed.times), 1000 * wan.config.boundary_ratio - 0.5
    last = max(t for t, past in enumerate(timed.transformers["transformer"].past()) if past >= 0)
    times[last] = below
    assert times[last] > times[last + 1]
    with pytest.raises(
        MismatchError, match="transformer at 4 of 11 steps, then transformer_2; in the schedule it is 5"
    ):
        sodaprof.apply(wan, replace(timed, update=replace(timed.update, times=tuple(times))))


def before_skips(wan, time: float) -> Schedule:
    """Returns a schedule whose first turn ends in three skipped steps, after a call at this time."""
    schedule, plans = schedule_of(wan), {}
    for (name, plan), row in zip(schedule.transformers.items(), ("CC---______", "_____CCCCCC"), strict=True):
        plans[name] = replace(plan, rows=dict.fromkeys(plan.rows, row), stack=row.replace("C", "."))
    own = schedule.sampler.timesteps
    update = replace(with_update(wan, schedule).update, times=(own[0], time, *own[2:]))
    return replace(schedule, transformers=plans, update=update)


def test_the_boundary_lies_below_all_times_of_a_turn_that_ends_in_skipped_steps():
    wan = small_wan()
    own = schedule_of(wan).sampler.timesteps
    for time in (0.5 * (own[4] + own[5]), own[5] + 0.01):  # below those of the skipped steps
        timed = before_skips(wan, time)
        wan.register_to_config(boundary_ratio=0.5 * (time + own[4]) / 1000)
        with pytest.raises(
            MismatchError, match="at 4 of 11 steps, then transformer_2; in the schedule it is 5"
        ) as caught:
            sodaprof.apply(wan, timed)
        below, above = re.search(r"above ([\d.]+) and at most ([\d.]+),", str(caught.value)).groups()
        said = re.search(r"boundary_ratio=([\d.]+)\)", str(caught.value))[1]
        for ratio in (said, above, float(below) + 1e-6):
            wan.register_to_config(boundary_ratio=float(ratio))
            with sodaprof.apply(wan, timed) as handle:
                draw_wan(wan)
                assert handle.report().executed == handle.report().planned
        for ratio in (float(above) + 1e-6, float(below)):
            wan.register_to_config(boundary_ratio=ratio)
            with pytest.raises(MismatchError, match="boundary_ratio"):
                sodaprof.apply(wan, timed)


# ---- the data basis of samplers of outputs ----------------------------------------------------------------------------


def in_data(pipe, schedule: Schedule, stir: float = 0.0) -> Schedule:
    """Returns the schedule with the sampler's own steps in the data basis."""
    own = own_update(pipe.scheduler, pipe.scheduler.timesteps, "data")
    rows = [[c + stir * (j < 2) * (-1) ** t for j, c in enumerate(row)] for t, row in enumerate(own.padded(3))]
    update = replace(schedule.update, basis="data", history=3, coefficients=rounded(rows))
    return replace(schedule, update=update)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "flow", "rectified"])
def test_the_own_steps_in_the_data_basis_are_the_plain_pipeline(sampler):
    pipe = pipe_of(TwoPassPipeline, sampler)
    plain, whole = sample(pipe), updated(pipe)
    schedule = in_data(pipe, whole)
    with sodaprof.apply(pipe, schedule):
        assert apart(sample(pipe), plain) < 2e-5
    resting = in_data(pipe, updated(pipe, RESTING), stir=0.02)
    with sodaprof.apply(pipe, resting):
        wanted = sample(pipe)
    assert apart(wanted, plain) > 1e-3
    with with_known_programs(sodaprof.apply(pipe, resting, runtime=runtime_of("whole-steps"))):
        for _ in range(3):
            assert apart(sample(pipe), wanted) < 1e-5
    pipe.scheduler = sodaprof.scheduler(resting)
    assert apart(sample(pipe, steps=CALLED), wanted) < 5e-6


def test_a_sampler_without_a_data_basis_is_refused():
    pipe = pipe_of(TwoPassPipeline, "ddpm")
    whole = updated(pipe)
    with (
        sodaprof.apply(pipe, replace(whole, update=replace(whole.update, basis="data"))),
        pytest.raises(UnsupportedModelError, match="data basis"),
    ):
        sample(pipe)
