"""Asks which prediction, from the profile alone, tells good schedules from bad ones; and how near each policy is to the best.

`make proxies`, or `python -m tests.proxies` with some of the stages. Random schedules of equal cost and all those of a small
budget are played on held-out generations; what build/proxies holds of them is not played again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sodaprof.compiler.open_loop import Span
from sodaprof.files import read_json, write_json
from sodaprof.models.load import load_pipeline
from sodaprof.models.replay import Replay
from sodaprof.profiles import Profile, load_profile

from . import proxy_truth
from .proxy_truth import Truths

HELD_OUT = 1_000_000  # the first seed of the generations that judge
GENERATIONS = 8
SCHEDULES, FULL_STEPS, LONGEST = 200, 14, 8  # random ones; full steps of 50; the longest interval that all tables cover
SMALL_STEPS, SMALL_FULL = 20, 6  # of the oracle
STAGES = ("updates", "reuse", "forecasts", "oracle-updates", "oracle-reuse", "page")


def replay_of(pipe: Any, profile: Profile, first: int) -> Replay:
    """Returns the generations of these seeds, prompts in turn as the profiler and the evaluation take them."""
    prompts, seeds = profile.manifest["prompts"], range(first, first + GENERATIONS)
    return Replay(pipe, profile.sampler, [prompts[seed % len(prompts)] for seed in seeds], seeds)


def wanted(stage: str, profile: Profile) -> list[str]:
    """Returns the schedules that a stage plays."""
    if stage.startswith("oracle"):
        return proxy_truth.every_column(profile.sampler.steps, SMALL_FULL)
    return proxy_truth.random_columns(profile.sampler.steps, FULL_STEPS, LONGEST, SCHEDULES)


def truths_of(stage: str, profile: Profile, build: Path) -> Truths:
    """Returns what is known of a stage; of another profile or other generations nothing is."""
    about = {"stage": stage, "profile": profile.digest(), "held_out": HELD_OUT, "generations": GENERATIONS}
    return Truths(build / f"{stage}.json", about)


def play_stage(stage: str, pipe: Any, profile: Profile, truths: Truths, every: Sequence[str]) -> None:
    """Plays the schedules of a stage that are not known yet."""
    if all(columns in truths.found for columns in every):
        return
    held_out = replay_of(pipe, profile, HELD_OUT)
    if stage.endswith("reuse"):
        truths.gather(every, lambda some: proxy_truth.reused(held_out, profile, some))
    elif stage == "forecasts":
        truths.gather(every, lambda some: proxy_truth.forecast(held_out, profile, some))
    elif stage == "updates":
        span = Span(profile.state_products(), profile.own_update(), profile.response())
        truths.gather(every, lambda some: proxy_truth.updated(held_out, span, some))
    else:
        calibration = replay_of(pipe, profile, profile.manifest["seed"])
        truths.gather(every, lambda some: proxy_truth.refitted(calibration, held_out, some))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proxies", description=__doc__)
    parser.add_argument("--profile", type=Path, default=Path("build/tiny-dit-profile"))
    parser.add_argument("--small", type=Path, default=Path(f"build/tiny-dit-{SMALL_STEPS}-profile"))
    parser.add_argument("--build", type=Path, default=Path("build/proxies"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/proxies-tiny-dit.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/proxies.md"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    profiles = {False: load_profile(options.profile), True: load_profile(options.small)}
    options.build.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline("tiny-dit", "float32", "cpu")
    for stage in options.stages:
        if stage != "page":
            profile = profiles[stage.startswith("oracle")]
            truths = truths_of(stage, profile, options.build)
            play_stage(stage, pipe, profile, truths, wanted(stage, profile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
