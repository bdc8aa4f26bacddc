"""Schedules of whole steps as one letter a step: read off a schedule, drawn again, and varied by a search.

C  every site computes
R  every site reuses
F  every site forecasts from the newest full steps
S  the stack is skipped, its last block's output or drift forecast from the newest full steps
-  the network is not called
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from ..errors import UnsupportedModelError
from ..formats.sampler import MAX_HISTORY
from ..formats.schedule import Forecast, Plan, Schedule, Update

# letter -> of the sites, of the stack
CELLS = {"C": ("C", "."), "R": ("R", "."), "F": ("F", "."), "S": ("-", "S"), "-": ("-", "-")}
LETTERS = {cells: letter for letter, cells in CELLS.items()}
SOURCES = 3  # full steps that a step forecasts from where the schedule has none that would say: as policy drift
REACH = (-3, -2, -1, 1, 2, 3)  # steps by which a full step may move
DRAWS = 10_000  # of which one must be new and allowed


def columns_of(schedule: Schedule) -> str:
    """Returns the letter of each step; UnsupportedModelError where a step mixes actions or takes others."""
    if len(schedule.transformers) != 1:
        raise UnsupportedModelError(
            f"The schedule drives several transformers ({', '.join(schedule.transformers)}); refine takes schedules of one."
        )
    (plan,) = schedule.transformers.values()
    columns = ""
    for step, cells in enumerate(zip(*plan.rows.values(), strict=True)):
        found = "".join(sorted(set(cells)))
        if (found, plan.stack[step]) not in LETTERS:
            raise UnsupportedModelError(
                "refine takes steps that compute (C), reuse (R) or forecast (F) at every site, skip the stack (S) or the "
                f"network (-); step {step} holds {found} (stack {plan.stack[step]}). Give a schedule of --policy solver, "
                "forecast, drift, taylor, dpcache, magcache, fora, soda --knob uas=none, or one of mix that has only such steps."
            )
        columns += LETTERS[found, plan.stack[step]]
    if len(forms := {cell.form for cell in plan.stack_forecasts}) > 1:
        raise UnsupportedModelError(
            f"The schedule's S steps forecast in the forms {', '.join(sorted(forms))}; expected one."
        )
    return columns


def drawn(schedule: Schedule, columns: str) -> Schedule:
    """Returns the schedule with these columns in place of its own, forecasts and update as place holders.

    What forecasts does so from the newest full steps, as many as in the schedule, S steps in its form.
    """
    ((name, plan),) = schedule.transformers.items()
    cells, stack = ("".join(CELLS[letter][i] for letter in columns) for i in (0, 1))
    form = plan.stack_forecasts[0].form if plan.stack_forecasts else "drift"
    skips = _forecasts(columns, "S", plan.stack_forecasts, form)
    at_sites = _forecasts(columns, "F", [cell for row in plan.forecasts.values() for cell in row], "output")
    new = Plan(
        plan.class_name, plan.fingerprint, dict.fromkeys(plan.rows, cells), stack,
        forecasts=dict.fromkeys(plan.rows, at_sites) if at_sites else {}, stack_forecasts=skips,
    )  # fmt: skip
    still = Update("output", MAX_HISTORY, ((1.0, *[0.0] * MAX_HISTORY),) * len(columns), {})
    return replace(schedule, transformers={name: new}, token_rule=None, update=schedule.update or still, measured=())


def _forecasts(columns: str, letter: str, like: Iterable[Forecast], form: str) -> tuple[Forecast, ...]:
    """Returns a forecast that reuses for each step of this letter, from as many full steps as the longest of `like`."""
    count, found = max((len(cell.sources) for cell in like), default=SOURCES), []
    for step, own in enumerate(columns):
        if own == letter:
            sources = [t for t in reversed(range(step)) if columns[t] == "C"][:count]
            found.append(Forecast(tuple(sources), (1.0, *[0.0] * (len(sources) - 1)), form))
    return tuple(found)


def proposed(
    columns: str,
    generator: random.Random,
    known: set[str],
    idle: str = "-R",
    allowed: Callable[[str], bool] = lambda columns: True,
) -> str | None:
    """Returns columns that are allowed and not known; None where none is found.

    A full step moved, or exchanged for another place, or another of the `idle` letters in place of one.
    """
    for _ in range(DRAWS):
        cells = list(columns)
        full = [t for t, letter in enumerate(cells) if letter == "C" and t]
        others = [t for t, letter in enumerate(cells) if letter != "C"]
        if not full or not others:
            return None
        kind = generator.random()
        if kind < 0.15:
            at = generator.choice(others)
            cells[at] = generator.choice([letter for letter in idle if letter != cells[at]])
        else:
            at = generator.choice(full)
            to = generator.choice(others) if kind < 0.3 else at + generator.choice(REACH)
            if not 0 < to < len(cells) or cells[to] == "C":
                continue
            cells[at], cells[to] = cells[to], cells[at]
        found = "".join(cells)
        if found not in known:
            if allowed(found):
                return found
            known.add(found)  # so that it is not drawn and counted again
    return None
