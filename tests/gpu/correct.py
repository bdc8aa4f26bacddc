"""Part 1: captured runs are the hooks' bit for bit on small networks, for every kind of cell; the tests marked `gpu`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sodaprof
from sodaprof.formats.schedule import Schedule
from sodaprof.runtime.compiled.engine import Compiled
from tests.gpu.common import Decoded, Results, Settings, captures_of, settings_of
from tests.tiny_pipelines import (
    FEW,
    MIXED_FORECASTS,
    MIXED_K,
    MIXED_ROWS,
    SITES,
    STEPS,
    TwoPassPipeline,
    few_schedule,
    schedule_for,
    tiny_pipe,
)
from tests.updated import with_update

ROUNDED = 0.05  # relative: how far runs that are equal except for rounding may be apart, in bf16 after all steps
PYTEST = [
    "-p",
    "no:cacheprovider",
    "-q",
    "-m",
    "gpu",
    "tests/runtime/compiled/test_kernels.py",
    "tests/pipelines/test_sampler_steps.py",
    "tests/runtime/compiled/test_graphs.py",
]

Make = Callable[[Any], Schedule]


def latents_of(pipe: Any, steps: int, labels: tuple[int, ...] = (1, 2), seed: int = 0) -> torch.Tensor:
    """Returns the last latents of a run, on the CPU; the decoder is a stub."""
    found: list[torch.Tensor] = []

    def stub(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Decoded:
        found.append(latents.detach().float().cpu())
        return Decoded((torch.zeros(len(labels), 3, 8, 8),))

    pipe.vae.decode = stub
    try:
        generator = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
        pipe(
            class_labels=list(labels),
            num_inference_steps=steps,
            generator=generator,
            guidance_scale=4.0,
            output_type="np",
        )
    finally:
        del pipe.vae.decode
    return found[0]


def reuse(pipe: Any) -> Schedule:
    return schedule_for(pipe, dict.fromkeys(SITES, "CRRC"), steps=FEW)


def skipped(pipe: Any) -> Schedule:
    """Steps without network under the sampler's own update."""
    pipe.scheduler.set_timesteps(STEPS)
    return with_update(pipe, schedule_for(pipe), "..-.--..")


def mixed(pipe: Any) -> Schedule:
    """Compute, reuse, forecast and prune in eight steps."""
    return schedule_for(pipe, MIXED_ROWS, MIXED_K, MIXED_FORECASTS)


# name -> schedule, its steps, pipeline, arguments of apply, whether the bits are those of the hooks
CASES: dict[str, tuple[Make, int, type | None, dict[str, Any], bool]] = {
    "all computed": (lambda pipe: schedule_for(pipe, steps=FEW), FEW, None, {}, True),
    "reuse": (reuse, FEW, None, {}, True),
    "reuse, two passes": (reuse, FEW, TwoPassPipeline, {}, True),
    "compute, reuse, forecast, prune": (few_schedule, FEW, None, {}, True),
    "the same in eight steps": (mixed, STEPS, None, {}, True),
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
        wanted = [latents_of(pipe, steps), latents_of(pipe, steps, (7, 3), seed=5)]
    with sodaprof.apply(pipe, schedule, runtime=Compiled(graphs=settings.recorder(), **options)) as handle:
        for _ in range(4):
            first = latents_of(pipe, steps)
        other = latents_of(pipe, steps, (7, 3), seed=5)
        found |= captures_of(handle)
        report = handle.report()
    pairs = list(zip(wanted, (first, other), strict=True))
    found["same bits"] = all(torch.equal(a, b) for a, b in pairs)
    found["apart"] = max(float((a - b).norm() / a.norm()) for a, b in pairs)
    assert report.executed == report.planned, f"executed {report.executed}, planned {report.planned}"
    called = steps - schedule.transformers["transformer"].stack.count("-")
    assert report.counters.steps_replayed == called, f"{report.counters.steps_replayed} of {called} steps were replayed"
    assert found["same bits"] or not exact, f"relative difference {found['apart']:.2e}, expected the same bits"
    assert found["apart"] <= ROUNDED, f"relative difference {found['apart']:.2e}, expected at most {ROUNDED}"


def draw_after_failure(settings: Settings, found: dict[str, Any]) -> None:
    """A capture that fails: the run goes on, the report says so, and the device still draws random numbers."""

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

    from sodaprof.runtime.compiled.graphs import CudaGraphs

    pipe = tiny_pipe().to(settings.device, torch.bfloat16)
    recorder = CudaGraphs() if settings.cuda else settings.recorder()
    with sodaprof.apply(pipe, schedule_for(pipe, steps=FEW), runtime=Compiled(graphs=Failing(recorder))) as handle:
        for _ in range(3):
            latents_of(pipe, FEW)
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
