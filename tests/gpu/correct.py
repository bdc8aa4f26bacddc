"""Part 1: captured runs are the hooks' bit for bit on small networks, for every kind of cell; the tests marked `gpu`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sodaprof
from sodaprof.formats.schedule import Schedule
from sodaprof.runtime.compiled.engine import Compiled
from sodaprof.runtime.compiled.graphs import CudaGraphs
from tests.gpu.common import Results, Settings, captures_of, check_run, settings_of
from tests.tiny_pipelines import (
    FEW,
    SITES,
    STEPS,
    TwoPassPipeline,
    few_schedule,
    mixed_schedule,
    schedule_for,
    tiny_pipe,
)
from tests.updated import RESTING, sample, with_update

ROUNDED = 0.05  # relative: how far runs that are equal except for rounding may be apart, in bf16 after all steps
GPU_TESTS = ("runtime/compiled/test_kernels", "pipelines/test_sampler_steps", "runtime/compiled/test_graphs")
PYTEST = ["-p", "no:cacheprovider", "-q", "-m", "gpu", *(f"tests/{name}.py" for name in GPU_TESTS)]

Make = Callable[[Any], Schedule]


def reuse(pipe: Any) -> Schedule:
    return schedule_for(pipe, dict.fromkeys(SITES, "CRRC"), steps=FEW)


def skipped(pipe: Any) -> Schedule:
    """Steps without network under the sampler's own update."""
    pipe.scheduler.set_timesteps(STEPS)
    return with_update(pipe, schedule_for(pipe), RESTING)


# name -> schedule, its steps, pipeline, arguments of apply, whether the bits are those of the hooks
CASES: dict[str, tuple[Make, int, type | None, dict[str, Any], bool]] = {
    "all computed": (lambda pipe: schedule_for(pipe, steps=FEW), FEW, None, {}, True),
    "reuse": (reuse, FEW, None, {}, True),
    "reuse, two passes": (reuse, FEW, TwoPassPipeline, {}, True),
    "compute, reuse, forecast, prune": (few_schedule, FEW, None, {}, True),
    "the same in eight steps": (mixed_schedule, STEPS, None, {}, True),
    "steps without network": (skipped, STEPS, None, {}, True),
    "sums one by one": (reuse, FEW, None, {"sums": None}, True),
    "fused sums": (reuse, FEW, None, {"sums": "fused"}, False),
    "tables in one product": (reuse, FEW, None, {"tables": "near"}, False),
    "whole steps": (few_schedule, FEW, None, {"whole_steps": True}, False),
    "whole steps, two passes": (reuse, FEW, TwoPassPipeline, {"whole_steps": True}, False),
    "whole steps, steps without network": (skipped, STEPS, None, {"whole_steps": True}, False),
}
REHEARSED = ("compute, reuse, forecast, prune", "whole steps, steps without network")


def compare(settings: Settings, name: str, dtype: torch.dtype, found: dict[str, Any]) -> None:
    """Fills an entry with how a captured run compares with the hooks; AssertionError if it is not what is expected."""
    make, steps, cls, options, exact = CASES[name]
    pipe = tiny_pipe(**({"cls": cls} if cls else {})).to(settings.device, dtype)
    schedule = make(pipe)
    with sodaprof.apply(pipe, schedule):
        wanted = [sample(pipe, steps=steps), sample(pipe, (7, 3), steps, seed=5)]
    with sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=settings.recorder(), **options)) as handle:
        for _ in range(4):
            first = sample(pipe, steps=steps)
        pairs = list(zip(wanted, (first, sample(pipe, (7, 3), steps, seed=5)), strict=True))
        found |= captures_of(handle)
    found["same bits"] = all(np.array_equal(a, b) for a, b in pairs)
    found["apart"] = max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)
    check_run(handle, schedule)
    assert found["same bits"] or not exact, f"relative difference {found['apart']:.2e}, expected the same bits"
    assert found["apart"] <= ROUNDED, f"relative difference {found['apart']:.2e}, expected at most {ROUNDED}"


def draw_after_failure(settings: Settings, found: dict[str, Any]) -> None:
    """Makes a capture fail: the run must go on, the report name the failure, and the device still draw random numbers."""

    class Failing:
        def __init__(self, recorder: Any) -> None:
            self.recorder = recorder

        def missing(self, device: torch.device) -> str | None:
            return None

        def forget(self) -> None:
            self.recorder.forget()

        def capture(self, run: Callable[[], Any]) -> Any:
            def fails() -> Any:
                run()
                raise RuntimeError("this capture is made to fail")

            return self.recorder.capture(fails)

    pipe = tiny_pipe().to(settings.device, torch.bfloat16)
    recorder = CudaGraphs() if settings.cuda else settings.recorder()
    with sodaprof.apply(pipe, schedule_for(pipe, steps=FEW), runtime=Compiled(graphs=Failing(recorder))) as handle:
        for _ in range(3):
            sample(pipe, steps=FEW)
        found["path"] = handle.report().path
    assert "made to fail" in found["path"]
    found["drawn"] = float(torch.randn(4, device=settings.device).abs().sum())


def main() -> int:
    settings = settings_of("correct")
    results = Results(settings)
    dtypes = (torch.bfloat16,) if settings.rehearsal else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for name in REHEARSED if settings.rehearsal else CASES:
            with results.entry(f"{name}, {str(dtype).removeprefix('torch.')}") as found:
                compare(settings, name, dtype, found)
    with results.entry("random numbers after a failed capture") as found:
        draw_after_failure(settings, found)
    if settings.cuda:
        with results.entry("pytest -m gpu") as found:
            found["code"] = int(pytest.main(PYTEST))
            assert found["code"] == 0, "tests failed: see log.txt"
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
