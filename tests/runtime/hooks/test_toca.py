"""Compiled ToCa and DuCa schedules, run, against `toca_reference`: the same tokens everywhere, the same numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sodaprof
from sodaprof.opensora.network import STDiT3
from tests.parity.toca_reference import Settings, recompute
from tests.toca_cases import CASES, MAKE, S1, S2, SAMPLES, Case, Scheduler, calls_of, compiled, dit, sharpened


def check_tokens(step: int, rows: Any, wanted: dict[str, torch.Tensor]) -> None:
    """A row that did not run keeps what it chose before; one that computes all of its tokens need not choose."""
    for row in rows:
        if row.cells[step].action == "-":
            assert row.key not in wanted
        elif row.key not in wanted:
            assert row.selected is None, (step, row.key)
        elif wanted[row.key].shape[1] < row.tokens:
            assert row.selected is not None, (step, row.key)
            assert torch.equal(row.selected, wanted[row.key]), (step, row.key)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def attached(network: Any, schedule: Any) -> tuple[Any, Any]:
    """Returns the handle of a schedule on the network, and the scheduler whose steps are those of the run."""
    pipe = SimpleNamespace(components={"transformer": network}, scheduler=Scheduler())
    return sodaprof.apply(pipe, schedule), pipe.scheduler


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_runs_are_those_of_the_methods(name, tmp_path, make_cost):
    case = CASES[name]
    torch.manual_seed(1)
    network = sharpened(MAKE[case.family](case.layers))
    calls = calls_of(case.family, Scheduler(case.steps).timesteps)
    schedule = compiled(case, network, calls[0], tmp_path, make_cost)

    trace = recompute(network, calls, case.settings)
    assert sum(letters[0] == "F" != letters[-1] for letters in trace.letters) == case.mixed
    assert sum(letters[-1] == "A" for letters in trace.letters) == case.skipped
    assert any(trace.selected) == (case.settings.R > 0)

    wide: list[torch.Tensor] = []  # Open-Sora's output before its cast to single precision
    if isinstance(network, STDiT3):
        network.final_layer.register_forward_hook(lambda module, args, out: wide.append(out))
    handle, scheduler = attached(network, schedule)
    with handle:
        scheduler.set_timesteps(len(calls))
        for step, (t, call) in enumerate(zip(scheduler.timesteps, calls, strict=True)):
            out = network(**call, return_dict=False)[0]
            if wide:
                out = network.unpatchify(wide.pop(), *out.shape[2:])
            check_tokens(step, handle.executor.rows, trace.selected[step])
            assert error(out, trace.outputs[step]) < 1e-12, step
            scheduler.step(out, t, call["hidden_states"])
        assert handle.report().complete
        assert handle.report().executed == handle.report().planned
    plain = next(t for t, letters in enumerate(trace.letters) if letters[-1] != "F")
    # the schedule is removed, and what was reused was not what the network computes
    assert error(network(**calls[plain]).sample.double(), trace.outputs[plain]) > 1e-3
    assert error(network(**calls[0]).sample.double(), trace.outputs[0]) < 1e-7


@pytest.mark.parametrize(("family", "settings"), [
    ("dit", Settings("toca", 1, 0.0, S1, "ddim50")),
    ("pixart", Settings("duca", 1, 0.5, S2, "pixart")),
    ("opensora", Settings("toca", 3, 0.1, S2, "opensora")),
])  # fmt: skip
@torch.no_grad()
def test_the_reference_computes_the_network_if_all_steps_are_full(family, settings):
    torch.manual_seed(2)
    network = sharpened(MAKE[family](3))
    calls = calls_of(family, torch.tensor([900, 500, 100]))  # Open-Sora's first three steps are full
    trace = recompute(network, calls, settings)
    assert trace.letters == ["FFF"] * 3
    for call, out in zip(calls, trace.outputs, strict=True):
        assert error(network(**call).sample.double(), out) < (1e-7 if family == "opensora" else 1e-13)


@torch.no_grad()
def test_branches_in_passes_are_those_in_halves(tmp_path, make_cost):
    """If the halves share nothing, one call each does what both in one batch do."""
    case = CASES["dit-duca-50"]
    torch.manual_seed(3)
    network = sharpened(dit(case.layers))
    calls = calls_of("dit", Scheduler(case.steps).timesteps)
    trace = recompute(network, calls, case.settings)

    parts = [slice(i * SAMPLES, (i + 1) * SAMPLES) for i in (0, 1)]
    halves = [[{key: value[part] for key, value in call.items()} for part in parts] for call in calls]
    handle, scheduler = attached(network, compiled(case, network, halves[0][0], tmp_path, make_cost, "passes"))
    with handle:
        scheduler.set_timesteps(case.steps)
        for step, t in enumerate(scheduler.timesteps):
            for part, half in zip(parts, halves[step], strict=True):
                out = network(**half).sample
                check_tokens(
                    step, handle.executor.rows, {key: index[part] for key, index in trace.selected[step].items()}
                )
                assert error(out, trace.outputs[step][part]) < 1e-12, (step, part)
            scheduler.step(out, t, half["hidden_states"])
        assert handle.report().executed == handle.report().planned


@torch.no_grad()
def test_random_tokens_are_the_same_in_all_samples_and_runs(tmp_path, make_cost):
    case = Case("dit", 20, 2, Settings("toca", 3, 0.1, "random", "ddim50"), {"R": 0.1, "score": "random"})
    torch.manual_seed(4)
    network = sharpened(dit(case.layers))
    calls = calls_of("dit", Scheduler(case.steps).timesteps)
    handle, scheduler = attached(network, compiled(case, network, calls[0], tmp_path, make_cost))
    runs: list[list[torch.Tensor]] = []
    with handle:
        for _ in range(2):
            runs.append([])
            scheduler.set_timesteps(case.steps)
            for t, call in zip(scheduler.timesteps, calls, strict=True):
                out = network(**call).sample
                runs[-1] += [row.selected.clone() for row in handle.executor.rows if row.selected is not None]
                scheduler.step(out, t, call["hidden_states"])
    first, second = runs
    assert len(first) > 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(index, index[:1].expand_as(index)) for index in first)
    assert len({tuple(index[0].tolist()) for index in first}) == len(first)  # other ones at each site and step
