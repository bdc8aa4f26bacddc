"""Callbacks that change the order of the batch's rows: refused where caches of other rows would be read, and only there."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from msgspec.structs import replace

import sodaprof
from sodaprof.errors import MismatchError
from sodaprof.runtime.row_order import RowOrder, carrying
from tests.tiny_flux import STEPS, draw_rows, flux_pipe, flux_schedule
from tests.tiny_pipelines import SITES, draw, mixed_schedule, schedule_for, skipping_schedule, tiny_pipe
from tests.updated import updated

CHANGES = {
    "exchanged": lambda latents: latents[[1, 0, 2]],
    "resampled": lambda latents: latents[[0, 0, 2]],
    "in place": lambda latents: latents.copy_(latents[[2, 0, 1]]),
}
KEPT = {
    "none": lambda latents: latents,
    "copied": lambda latents: latents.clone(),
    "rounded": lambda latents: latents.half().float(),
    "moved": lambda latents: latents * 1.1,
}


@pytest.fixture(scope="module")
def schedule():
    return flux_schedule(flux_pipe())


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
def test_rows_in_another_order_are_refused_where_caches_are_read(schedule, runtime):
    pipe = flux_pipe()
    with sodaprof.apply(pipe, schedule, runtime=runtime) as handle:
        alone = draw_rows(pipe)
        for name, change in CHANGES.items():
            for after in (0, 3) if name == "exchanged" else (1,):
                with pytest.raises(
                    MismatchError, match=f"changed places before step {after + 1} .*only before step 5,"
                ):
                    draw_rows(pipe, change, after)
                assert handle.report().complete
        assert torch.equal(draw_rows(pipe), alone)
        draw_rows(pipe, CHANGES["exchanged"], 4)  # no later cell reads what an earlier one wrote
        for change in KEPT.values():
            draw_rows(pipe, change)
        draw_rows(pipe, lambda latents: latents[[0]], count=1)
        with torch.inference_mode(), pytest.raises(MismatchError, match="changed places before step 2"):
            draw_rows(pipe, CHANGES["in place"], 1)
        assert torch.equal(draw_rows(pipe), alone)


def test_an_all_computed_schedule_lets_rows_change_places(schedule):
    pipe = flux_pipe()
    wanted = draw_rows(pipe, CHANGES["resampled"], 2)
    plan = schedule.transformers["transformer"]
    computed = replace(plan, rows=dict.fromkeys(plan.rows, "C" * STEPS), k={}, forecasts={})
    with sodaprof.apply(pipe, replace(schedule, transformers={"transformer": computed}, token_rule=None)):
        assert torch.equal(draw_rows(pipe, CHANGES["resampled"], 2), wanted)


def test_the_v_of_a_fitted_update_belong_to_rows_too():
    pipe = tiny_pipe()
    schedule = updated(pipe, "..-.-...", stir=0.1)
    assert carrying(schedule)[2]
    flips = []
    scale = pipe.scheduler.scale_model_input

    def flip(sample, *timestep):
        flips.append(1)
        half = sample[: len(sample) // 2].flip(0) if len(flips) == 3 else sample[: len(sample) // 2]
        sample.copy_(torch.cat([half, half]))
        return scale(sample, *timestep)

    with sodaprof.apply(pipe, schedule):
        pipe.scheduler.scale_model_input = flip
        with pytest.raises(MismatchError, match="changed places before step 2"):
            draw(pipe)


def test_halves_that_the_sampler_moves_apart_are_no_change_of_order():
    pipe = tiny_pipe()  # its scheduler gets both branches, and DDPM draws noise for each
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    schedule = schedule_for(pipe, {SITES[0]: "CRRCRRRC"})
    with sodaprof.apply(pipe, schedule) as handle:
        draw(pipe, (1, 2, 3))
        assert handle.report().executed == handle.report().planned


def test_the_steps_before_which_something_is_kept():
    pipe = tiny_pipe()
    assert carrying(schedule_for(pipe)) == [False] * 8
    assert carrying(schedule_for(pipe, {SITES[0]: "CRCCCPRC"}, {SITES[0]: (4,)})) == [c == "y" for c in "nynnnyyn"]
    assert carrying(skipping_schedule(pipe))[1:] == [True] * 6 + [False]
    assert carrying(mixed_schedule(pipe))[1:] == [True] * 6 + [False]


def test_a_comparison_waits_for_no_device(schedule):
    clock = SimpleNamespace(run=None)
    order = RowOrder(schedule, clock)
    for step in range(STEPS):  # a tensor without values raises if anything reads one
        order.take(
            lambda output, timestep, sample: (sample + output,), None, step, *torch.zeros(3, 3, 4, device="meta")
        )
    assert [*order.moved] == [1, 2, 3, 4]
