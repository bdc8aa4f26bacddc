"""Asks which prediction, from the profile alone, tells good schedules from bad ones; and how near each policy is to the best.

`make proxies`, or `python -m tests.studies.proxies` with some of the `--stages`. Random schedules of equal cost and all
those of a small budget are played on held-out generations; what build/proxies holds of them is not played again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sodaprof.formats.files import digest, write_json
from sodaprof.formats.profile import Profile, load_profile
from sodaprof.pipelines.device import device_facts
from sodaprof.pipelines.load import load_pipeline
from sodaprof.pipelines.replay import Replay
from tests.studies import proxy_page, proxy_study, proxy_truth
from tests.studies.proxy_truth import Truths

HELD_OUT = 1_000_000  # the first seed of the generations that judge
GENERATIONS = 8
SCHEDULES, FULL_STEPS, LONGEST = 200, 14, 8  # random ones; full steps of 50; the longest interval that all tables cover
SMALL_FULL = 6  # full steps of the oracle
ORACLE, PLACED = "oracle-", "placements"
WEIGHED = ("updates", "forecasts")  # stages whose weights come from the profile
COUNTS, PLACED_GENERATIONS = (
    (10, 14, 18, 25),
    16,
)  # full steps of 50 that each prediction places; what they are judged by
STAGES = ("updates", "reuse", "forecasts", PLACED, "oracle-updates", "oracle-reuse", "page")


class Study:
    """The stages of the study: which schedules each plays on which profile, and what is known of them."""

    def __init__(self, profile: Profile, small: Profile, build: Path) -> None:
        self.profile, self.small, self.build = profile, small, build
        build.mkdir(parents=True, exist_ok=True)

    def of(self, stage: str) -> Profile:
        """Returns the profile that a stage is about."""
        return self.small if stage.startswith(ORACLE) else self.profile

    def every(self) -> list[str]:
        """Returns the schedules among which the oracle knows the best."""
        return proxy_truth.every_column(self.small.sampler.steps, SMALL_FULL)

    def wanted(self, stage: str) -> list[str]:
        """Returns the schedules that a stage plays: random ones, or the oracle's and those that policies place freely."""
        if stage == PLACED:
            return list(dict.fromkeys(columns for of_count in self.placed().values() for columns in of_count.values()))
        if not stage.startswith(ORACLE):
            return proxy_truth.random_columns(self.profile.sampler.steps, FULL_STEPS, LONGEST, SCHEDULES)
        steps = self.small.sampler.steps
        free = [proxy_study.uniform(steps, SMALL_FULL, False)]
        free += [p.placed(SMALL_FULL) for p in proxy_study.predictors(self.small)]
        return list(dict.fromkeys([*self.every(), *(proxy_truth.columns_at(some, steps) for some in free)]))

    def placed(self) -> dict[int, dict[str, str]]:
        """Returns where each prediction places so many full steps: {full steps: {name: columns}}."""
        some, steps = proxy_study.predictors(self.profile), self.profile.sampler.steps
        by_name = {p.name: p for p in some}
        simulate = proxy_study.simulator(proxy_study.span_of(self.profile), "updates")
        found = {}
        for count in COUNTS:
            full = {p.name: p.placed(count) for p in some} | {
                proxy_study.EVEN: proxy_study.uniform(steps, count, False)
            }
            full["as `solver`, the first three steps full"] = replace(by_name[proxy_study.SOLVER], first=3).placed(
                count
            )
            full["of all these, that of least simulated error"] = min(full.values(), key=simulate)
            found[count] = {name: proxy_truth.columns_at(anchors, steps) for name, anchors in full.items()}
        return found

    def truths(self, stage: str) -> Truths:
        """Returns what is known of a stage; of other full runs or generations nothing is.

        Nor of another profile, where the profile's tables gave the weights; elsewhere they are fitted closed loop, or none.
        """
        generations = PLACED_GENERATIONS if stage == PLACED else GENERATIONS
        profile = self.of(stage)
        energies = [f"{energy:.3g}" for energy in np.diagonal(profile.state_products())]
        runs = [profile.sampler.to_json(), profile.manifest["prompts"], profile.manifest["seed"], energies]
        about = {
            "stage": stage, "of": profile.digest() if stage in WEIGHED else digest(runs), "held_out": HELD_OUT,
            "generations": generations,
        }  # fmt: skip
        return Truths(self.build / f"{stage}.json", about)

    def play(self, stage: str, pipe: Any) -> None:
        """Plays the schedules of a stage that are not known yet."""
        profile, truths, wanted = self.of(stage), self.truths(stage), self.wanted(stage)
        if all(columns in truths.found for columns in wanted):
            return
        held_out = replay_of(pipe, profile, HELD_OUT, truths.about["generations"])
        if stage.endswith("reuse"):
            truths.gather(wanted, lambda some: proxy_truth.reused(held_out, profile, some))
        elif stage == "forecasts":
            truths.gather(wanted, lambda some: proxy_truth.forecast(held_out, profile, some))
        elif stage == "updates":
            span = proxy_study.span_of(profile)
            truths.gather(wanted, lambda some: proxy_truth.updated(held_out, span, some))
        else:
            calibration = replay_of(pipe, profile, profile.manifest["seed"], GENERATIONS)
            truths.gather(wanted, lambda some: proxy_truth.refitted(calibration, held_out, some))

    def summary(self) -> dict[str, Any]:
        """Returns what the tables hold. Stages that are not played to their end are left out."""
        known = {stage: self.truths(stage).found for stage in STAGES[:-1]}
        known = {
            stage: found for stage, found in known.items() if all(one in found for one in self.wanted(stage))
        }  # fmt: skip
        oracles = {stage.removeprefix(ORACLE): found for stage, found in known.items() if stage.startswith(ORACLE)}
        every = self.every()
        held_out = {family: {one: found[one][:GENERATIONS] for one in every} for family, found in oracles.items()}
        placed = proxy_study.placements(self.small, every, SMALL_FULL)
        return {
            "format": "sodaprof.proxies", "version": 1, "command": "make proxies", "machine": device_facts("cpu")["name"],
            "versions": self.profile.manifest["versions"], "generations": GENERATIONS, "held_out": HELD_OUT,
            "profiles": {"random": self.profile.reference(), "oracle": self.small.reference()},
            "random": {
                family: proxy_study.study(self.profile, family, known[family], self.wanted(family))
                for family in proxy_study.FAMILIES if family in known
            },
            "placements": {
                str(count): proxy_study.compared(placed_by, known[PLACED], PLACED_GENERATIONS)
                for count, placed_by in self.placed().items() if PLACED in known
            },
            "all": {family: proxy_study.study(self.small, family, found, every) for family, found in held_out.items()},
            "oracle": {"steps": self.small.sampler.steps, "full": SMALL_FULL}
            | {family: proxy_study.oracle(placed, found, every, GENERATIONS) for family, found in oracles.items()},
        }  # fmt: skip


def replay_of(pipe: Any, profile: Profile, first: int, count: int) -> Replay:
    """Returns the generations of these seeds, prompts in turn as the profiler and the evaluation take them."""
    prompts, seeds = profile.manifest["prompts"], range(first, first + count)
    return Replay(pipe, profile.sampler, [prompts[seed % len(prompts)] for seed in seeds], seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.studies.proxies", description=__doc__)
    parser.add_argument("--profile", type=Path, default=Path("build/tiny-dit-profile"))
    parser.add_argument("--small", type=Path, default=Path("build/tiny-dit-20-profile"), help="of 20 steps")
    parser.add_argument("--build", type=Path, default=Path("build/proxies"), help="what was played so far")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/results/proxies-tiny-dit.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/studies/proxies.md"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    study = Study(load_profile(options.profile), load_profile(options.small), options.build)
    pipe = load_pipeline("tiny-dit", "float32", "cpu")
    for stage in options.stages:
        if stage != "page":
            study.play(stage, pipe)
    if "page" in options.stages:
        result = study.summary()
        write_json(options.output, result, force=True)
        proxy_page.fill(options.page, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
