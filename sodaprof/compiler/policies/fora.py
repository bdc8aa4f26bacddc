"""FORA (arXiv 2407.01425): full steps at even intervals, everything reused between them. The baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...formats.schedule import Schedule
from ..knobs import knob
from ..problem import Problem, WholeSteps, draw_schedule


@dataclass(frozen=True)
class ForaKnobs:
    anchors: int = knob(0, "full steps; 0: as many as the budget allows", least=0)


def compile_fora(problem: Problem, knobs: ForaKnobs) -> Schedule:
    """Returns the schedule with full steps at round(i · T / k), k the largest within the budget (or the knob `anchors`).

    Of transformers that take turns, each has its share of the full steps, spread over its own; see `_shares`.
    """
    turns = [(name, turn) for name, own in problem.turns.items() for turn in own]
    lengths = [len(turn) for _, turn in turns]

    def loop(count: int) -> WholeSteps:
        full = dict.fromkeys(problem.model.transformers, 0)
        for (name, _), share in zip(turns, _shares(lengths, count), strict=True):
            full[name] += share
        return problem.whole_steps(full, "R")

    possible = range(len(turns), problem.sampler.steps + 1)
    count = max(problem.affordable(possible, loop, knobs.anchors, bounded=False))
    shares = zip(turns, _shares(lengths, count), strict=True)
    anchors = sorted({turn.start + round(i * len(turn) / k) for (_, turn), k in shares for i in range(k)})
    schedule = draw_schedule(problem.model, problem.sampler, anchors, {})
    return problem.signed(schedule, "fora", replace(knobs, anchors=count), None)


def _shares(lengths: list[int], count: int) -> list[int]:
    """Returns how many of `count` full steps each turn has: one, and each further one in the turn of longest intervals."""
    shares = [1] * len(lengths)
    for _ in range(count - len(lengths)):
        longest = max(range(len(lengths)), key=lambda i: lengths[i] / shares[i])
        shares[longest] += 1
    return shares
