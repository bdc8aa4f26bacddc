"""Schedules of whole steps written as one letter a step (`columns`): read off a schedule, made into one, and varied.

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

CELLS = {"C": ("C", "."), "R": ("R", "."), "F": ("F", "."), "S": ("-", "S"), "-": ("-", "-")}  # of the sites, the stack
LETTERS = {cells: letter for letter, cells in CELLS.items()}
SOURCES = 3  # full steps that a step forecasts from if the schedule has no forecast: as policy drift
REACH = (-3, -2, -1, 1, 2, 3)  # steps by which a full step may move
DRAWS = 10_000  # random variations of which one must be new and allowed


def columns_of(schedule: Schedule) -> str:
    """Returns the letter of each step. Raises UnsupportedModelError if a step mixes actions or has other actions."""
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


def with_columns(schedule: Schedule, columns: str) -> Schedule:
    """Returns the schedule with these columns instead of its own; forecasts and, if it has none, its update are not fitted yet.

    Forecasts are from the newest full steps, as many as in the schedule, S steps in its form.
    """
    ((name, plan),) = schedule.transformers.items()
    row, stack = ("".join(CELLS[letter][i] for letter in columns) for i in (0, 1))
    form = plan.stack_forecasts[0].form if plan.stack_forecasts else "drift"
    of_stack = _forecasts(columns, "S", plan.stack_forecasts, form)
    of_sites = _forecasts(columns, "F", [cell for row in plan.forecasts.values() for cell in row], "output")
    new = Plan(
        plan.class_name, plan.fingerprint, dict.fromkeys(plan.rows, row), stack,
        forecasts=dict.fromkeys(plan.rows, of_sites) if of_sites else {}, stack_forecasts=of_stack,
    )  # fmt: skip
    update = schedule.update or Update("output", MAX_HISTORY, ((1.0, *[0.0] * MAX_HISTORY),) * len(columns), {})
    if columns != columns_of(schedule):
        update = replace(update, times=None, initial=None)  # they belong to the steps that were full
    return replace(schedule, transformers={name: new}, token_rule=None, update=update, measured=())


def _forecasts(columns: str, letter: str, known: Iterable[Forecast], form: str) -> tuple[Forecast, ...]:
    """Returns for each step of this letter a forecast that reuses, with as many sources as the longest of `known`."""
    count, found = max((len(cell.sources) for cell in known), default=SOURCES), []
    for step, own in enumerate(columns):
        if own == letter:
            sources = [t for t in reversed(range(step)) if columns[t] == "C"][:count]
            found.append(Forecast(tuple(sources), (1.0, *[0.0] * (len(sources) - 1)), form))
    return tuple(found)


def varied(
    columns: str,
    generator: random.Random,
    known: set[str],
    fillers: str = "-R",
    allowed: Callable[[str], bool] = lambda columns: True,
) -> str | None:
    """Returns a random variation of the columns that is allowed and not known; None if none is found.

    A full step is moved, or exchanged with a step that is not full, or a step that is not full gets another letter of
    `fillers`. What is not allowed is added to `known`, so that it is checked once.
    """
    for _ in range(DRAWS):
        cells = list(columns)
        full = [t for t, letter in enumerate(cells) if letter == "C" and t]
        others = [t for t, letter in enumerate(cells) if letter != "C"]
        if not full or not others:
            return None
        kind = generator.random()
        if kind < 0.15:
            step = generator.choice(others)
            cells[step] = generator.choice([letter for letter in fillers if letter != cells[step]])
        else:
            step = generator.choice(full)
            target = generator.choice(others) if kind < 0.3 else step + generator.choice(REACH)
            if not 0 < target < len(cells) or cells[target] == "C":
                continue
            cells[step], cells[target] = cells[target], cells[step]
        found = "".join(cells)
        if found not in known:
            if allowed(found):
                return found
            known.add(found)
    return None
