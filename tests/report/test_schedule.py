"""A schedule as plain data and as text."""

from __future__ import annotations

from io import StringIO

from msgspec.structs import replace
from rich.console import Console

from sodaprof.report.schedule import schedule_data, schedule_view
from tests.conftest import build_skipping


def text_of(schedule) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(schedule_view(schedule))
    return console.file.getvalue()


def test_reuse_ages_and_prune_rates_are_those_of_the_cells(schedule):
    sites = schedule_data(schedule)["transformers"]["transformer"]["sites"]
    site = sites["transformer_blocks.0.attn1"]
    assert site == {"row": "CRPCFR", "reuse_ages": {"1": 1, "2": 2, "5": 2}, "prune_rates": {"2": 0.75}}
    assert sites["transformer_blocks.0.ff"]["prune_rates"] == {"5": 1}


def test_network_times_are_shown_where_they_differ():
    schedule = build_skipping()
    own = schedule.sampler.timesteps
    times = (own[0] - 2.5, *own[1:5], own[5] + 0.75)
    timed = replace(schedule, update=replace(schedule.update, times=times, initial=(0.1,) * 6))
    line = f"network times (the sampler's) by step: 0: {times[0]:g} ({own[0]:g}), 5: {times[5]:g} ({own[5]:g})"
    assert line in [found.strip() for found in text_of(timed).splitlines()]
    assert "weighs the last 2 outputs and the first latents, fitted open loop" in text_of(timed)
    jointly = replace(timed, update=replace(timed.update, fitted={"loop": "joint", "samples": 30}))
    assert "fitted jointly on 30 generations" in text_of(jointly)
    assert schedule_data(timed)["update"]["times"] == times
    assert "network times" not in text_of(schedule)
