"""What steps cost that compute little, as shares of a full one: without network, reused, forecast from two sources.

    python -m tests.studies.light_steps tiny-dit build/bench/dit-s-2 -o docs/studies/results/light-steps.json

`make bench` does this. All kinds take turns within the same runs; a step is timed from one end of the scheduler's to the next, so
the pipeline's own Python between them is in it. CPU time of one thread, medians over the steps of a run, then over the runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sodaprof
from sodaprof.formats.files import write_json
from sodaprof.formats.sampler import rounded
from sodaprof.formats.schedule import Forecast, Plan, Schedule, Update
from sodaprof.pipelines.device import device_facts, versions
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.entries import default_prompts
from sodaprof.pipelines.load import call, default_guidance, load_pipeline
from sodaprof.pipelines.patch import patched
from sodaprof.pipelines.sampler_steps import own_update

STEPS, FIRST = 50, 4  # from this step on all kinds are timed
KINDS = {"C": "full", "R": "reuse", "F": "forecast, two sources", "-": "no network"}
ROW = "CC" + "CRFC-CF-CR-CCFRC" * 3


def schedule_of(pipe: Any, name: str) -> Schedule:
    """Returns a schedule of whole steps of every kind under the sampler's own update."""
    model, sampler, _ = inspect_pipeline(pipe, name, STEPS, default_guidance(pipe), default_prompts(pipe)[0])
    ((part, transformer),) = model.transformers.items()
    cells = []
    for step, action in enumerate(ROW):
        if action == "F":
            newest, before = [t for t in reversed(range(step)) if ROW[t] == "C"][:2]
            cells.append(Forecast((newest, before), (1.3127, -0.3251)))
    rows = {site.key: ROW for site in transformer.sites}
    stack = "".join("-" if action == "-" else "." for action in ROW)
    plan = Plan(
        transformer.class_name, transformer.fingerprint, rows, stack, forecasts=dict.fromkeys(rows, tuple(cells))
    )
    own = own_update(pipe.scheduler, sampler.timesteps)
    update = Update(own.basis, own.history, rounded(own.coefficients), {})
    return Schedule({part: plan}, sampler, model.shape, {"name": "light-steps", "knobs": {}}, update=update)


def timed(pipe: Any, schedule: Schedule, runs: int) -> np.ndarray:
    """Returns the CPU time of each step of each run, [runs, STEPS], NaN for the first step; ms. Two runs warm up."""
    entries, found = default_prompts(pipe)[:1], np.full((runs + 2, STEPS), np.nan)
    ends: list[int] = []
    with sodaprof.apply(pipe, schedule, runtime="compiled"):

        def advance(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            ends.append(time.process_time_ns())
            return result

        with patched(pipe.scheduler, "step", advance):
            for run in range(len(found)):
                ends.clear()
                call(pipe, entries, [run], STEPS, schedule.sampler.guidance_scale, output_type="latent")
                found[run, 1:] = np.diff(ends) / 1e6
    return found[2:]


def shares(times: np.ndarray) -> dict[str, Any]:
    """Returns the medians of the kinds in ms, and in percent of a full step with the quartiles over the runs."""
    at = {kind: [t for t in range(FIRST, STEPS) if ROW[t] == letter] for letter, kind in KINDS.items()}
    medians = {kind: np.median(times[:, steps], axis=1) for kind, steps in at.items()}
    full = medians["full"]
    percent = {kind: 100 * ms / full for kind, ms in medians.items() if kind != "full"}
    percent["forecast over reuse"] = percent["forecast, two sources"] - percent["reuse"]
    quartiles = {kind: [round(float(q), 3) for q in np.percentile(v, (25, 50, 75))] for kind, v in percent.items()}
    return {"ms": {kind: round(float(np.median(ms)), 4) for kind, ms in medians.items()}, "percent of full": quartiles}


def main() -> None:
    """Times the models that are named and writes one file."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.studies.light_steps", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("models", nargs="+", help="model folders or names")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        pipe = load_pipeline(name, "float32", "cpu")
        schedule = schedule_of(pipe, name)
        rows.append({"model": Path(name).name} | shares(timed(pipe, schedule, options.runs)))
        print(rows[-1])
    about = {
        "format": "sodaprof.light-steps",
        "version": 1,
        "command": "make bench",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
    }
    about |= {"hardware": device_facts("cpu"), "versions": versions(), "runs": options.runs, "runtime": "lowered"}
    write_json(options.output, about | {"rows": rows}, force=True)


if __name__ == "__main__":
    main()
