"""The fewer-step controls: solvers on the full run's own grid, for discrete diffusions and for flows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from msgspec.structs import replace

from sodaprof.measure.controls import DIFFUSION, FLOW, FewerSteps, fewer_steps_at, full_steps, solvers_for
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.pipelines.discover import inspect_pipeline
from tests.tiny_pipelines import STEPS, draw, mixed_schedule, schedule_for, tiny_pipe
from tests.video_pipelines import draw as draw_clip
from tests.video_pipelines import tiny_video_pipe


def walk(control, scheduler, velocity, start=1.0):
    """Samples a scalar through the control's scheduler; velocity(x, s) is given as the network's output, s in 0…1."""
    pipe = SimpleNamespace(scheduler=scheduler)
    with control.on(pipe):
        pipe.scheduler.set_timesteps(control.steps)
        x = torch.full((1, 1), start, dtype=torch.float64)
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(velocity(x, t.double() / 1000), t, x, return_dict=False)[0]
    return x.item()


def own_timesteps(pipe):
    return tuple(round(t) for t in schedule_for(pipe).sampler.timesteps)


def test_first_order_solver_on_all_timesteps_is_the_pipelines_own_ddim():
    """The fewer-step control must differ from the full run by its steps alone."""
    pipe = tiny_pipe()
    full = draw(pipe)
    with FewerSteps("DDIM", "even", STEPS, own_timesteps(pipe)).on(pipe):
        np.testing.assert_allclose(draw(pipe), full, atol=2e-4)
    for solver in ("DPM++ 2M", "UniPC"):
        with FewerSteps(solver, "even", STEPS, own_timesteps(pipe)).on(pipe):
            assert np.abs(draw(pipe) - full).max() > 1e-4
    assert isinstance(pipe.scheduler, DDIMScheduler)


def test_second_order_solvers_agree_in_the_limit():
    """UniPC solves DPM++'s equation: on the same grid the two come together as steps are added, faster than DDIM does."""
    pipe = tiny_pipe()
    apart = {}
    for steps in (25, 100):
        timesteps = tuple(round(t) for t in schedule_for(pipe, steps=steps).sampler.timesteps)
        found = {}
        for solver in DIFFUSION:
            with FewerSteps(solver, "even", steps, timesteps).on(pipe):
                found[solver] = draw(pipe, steps=steps)
        apart[steps] = {solver: np.abs(found[solver] - found["DPM++ 2M"]).mean() for solver in ("DDIM", "UniPC")}
    assert apart[100]["UniPC"] < 0.4 * apart[25]["UniPC"]
    assert apart[100]["UniPC"] < 0.2 * apart[100]["DDIM"]


@pytest.mark.parametrize("solver", DIFFUSION)
def test_pinned_timesteps_are_those_that_run(solver):
    pipe = tiny_pipe()
    chosen = own_timesteps(pipe)[::3]
    with FewerSteps(solver, "anchors", len(chosen), chosen).on(pipe):
        draw(pipe, steps=len(chosen))
        scheduler = pipe.scheduler
    assert scheduler.timesteps.tolist() == list(chosen)
    noise = 1 - scheduler.alphas_cumprod[list(chosen)]
    np.testing.assert_allclose(scheduler.sigmas[:-1], (noise / (1 - noise)) ** 0.5, rtol=1e-4)
    assert scheduler.sigmas[-1] == 0


def test_euler_on_all_timesteps_is_the_plain_flow_bit_for_bit():
    pipe = tiny_video_pipe(transform=False)
    _, sampler, _ = inspect_pipeline(pipe, "tiny", 6, 7.0, "a red disk moves left")
    plain = draw_clip(pipe)
    with FewerSteps("Euler", "even", 6, sampler.timesteps).on(pipe):
        np.testing.assert_array_equal(draw_clip(pipe), plain)
    with FewerSteps("Adams-Bashforth", "even", 6, sampler.timesteps).on(pipe):
        assert np.abs(draw_clip(pipe) - plain).max() > 1e-6
    with FewerSteps("Euler", "stock", 6, None).on(pipe):
        np.testing.assert_array_equal(draw_clip(pipe), plain)


@pytest.mark.parametrize("kind", [RectifiedFlowScheduler, FlowMatchEulerDiscreteScheduler])
def test_adams_bashforth_is_of_second_order_on_uneven_steps(kind):
    """dx/ds = x over s from 1 to 0 ends at e^-1: eight times the steps, 64 times the accuracy; Euler's is eight times."""
    scheduler = kind(use_timestep_transform=False) if kind is RectifiedFlowScheduler else kind()
    sign = -1.0 if kind is RectifiedFlowScheduler else 1.0  # Open-Sora's velocity points at the data

    def error(solver, steps):
        grid = tuple((1000 * (1 - np.arange(steps) / steps) ** 1.3).tolist())
        end = walk(FewerSteps(solver, "anchors", steps, grid), scheduler, lambda x, s: sign * x)
        return abs(end - np.exp(-1))

    assert error("Euler", 20) / error("Euler", 160) == pytest.approx(8, rel=0.2)
    assert error("Adams-Bashforth", 20) / error("Adams-Bashforth", 160) == pytest.approx(64, rel=0.3)


def test_adams_bashforth_forgets_between_runs():
    control = FewerSteps("Adams-Bashforth", "even", 4, (1000.0, 700.0, 400.0, 100.0))
    scheduler = RectifiedFlowScheduler(use_timestep_transform=False)
    first = walk(control, scheduler, lambda x, s: -x * s)
    walk(control, scheduler, lambda x, s: x + 5)
    assert walk(control, scheduler, lambda x, s: -x * s) == first


def test_fewer_steps_keep_the_full_runs_timesteps_and_the_cost():
    pipe = tiny_pipe()
    schedule = mixed_schedule(pipe)
    own = list(schedule.sampler.timesteps)
    found = fewer_steps_at(schedule, 5)
    for control in found:
        assert control.steps <= 5
        if control.timesteps is not None:
            assert control.timesteps[0] == own[0]
            assert [t for t in own if t in control.timesteps] == list(control.timesteps)
    assert {c.spacing for c in found} == {"even", "anchors", "stock leading", "stock trailing"}
    assert {c.solver for c in found} == set(DIFFUSION)
    assert fewer_steps_at(schedule, 1) == []
    assert not [c for c in fewer_steps_at(schedule, 2) if c.spacing == "anchors" and c.steps > 2]
    assert (full_steps(50, 2.0), full_steps(50, 2.0004), full_steps(50, 50 / 49)) == (25, 24, 49)


def test_steps_without_the_network_are_no_anchors():
    pipe = tiny_pipe()
    schedule, columns = schedule_for(pipe), "C-CC--C-"
    ((name, plan),) = schedule.transformers.items()
    plan = replace(plan, rows=dict.fromkeys(plan.rows, columns), stack=columns.replace("C", "."))
    found = fewer_steps_at(replace(schedule, transformers={name: plan}), 4)
    own = own_timesteps(pipe)
    assert {c.timesteps for c in found if c.spacing == "anchors"} == {tuple(own[t] for t in (0, 2, 3, 6))}


def test_solvers_go_by_the_samplers_family():
    diffusion = schedule_for(tiny_pipe()).sampler
    assert solvers_for(diffusion) == tuple(DIFFUSION)
    assert solvers_for(replace(diffusion, config={})) == ()
    flow = replace(diffusion, class_name="FlowMatchEulerDiscreteScheduler", config={"invert_sigmas": False})
    assert solvers_for(flow) == FLOW
    assert solvers_for(replace(flow, config={"stochastic_sampling": True})) == ()
