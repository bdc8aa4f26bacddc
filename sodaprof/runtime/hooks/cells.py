"""What a site does at each step: immutable cells, made of a schedule's row before the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...formats.schedule import Forecast, Plan

Output = Any  # a tensor [B, N, D], or the tuple of tensors that a joint attention returns


@dataclass(frozen=True)
class Cell:
    """One site at one step."""

    action: str  # C, R, F, P or -
    k: int = 0  # tokens that a P cell recomputes
    forecast: Forecast | None = None  # of an F cell
    chooses: bool = False  # a P cell of neither none nor all tokens
    observes: bool = False  # a later cell scores its tokens by this cell's attention
    age_growth: int = 0  # steps by which token ages grew since the site last computed tokens
    keeps_cache: bool = False  # an R or P cell reads the cache before the next C cell
    slot: int | None = None  # slot in which the output is kept as a source of forecasts
    read_slots: tuple[int, ...] = ()  # slots of the forecast's sources, in its order
    drops: tuple[int, ...] = ()  # source steps that no later forecast reads

    @property
    def computes(self) -> bool:
        """Whether the module runs, for some of its tokens or for all."""
        return self.action == "C" or (self.action == "P" and self.k > 0)

    @property
    def reuses(self) -> bool:
        """Whether the cell creates nothing that is kept: R, F, and P without tokens."""
        return self.action in "RF" or (self.action == "P" and not self.k)

    def arithmetic(self) -> tuple[Any, ...]:
        """Returns what the output depends on besides tensors: equal cells map equal inputs to equal outputs."""
        weights = self.forecast.weights if self.forecast else ()
        return self.action, self.k, weights, self.observes, self.age_growth

    def storage(self) -> tuple[Any, ...]:
        """Returns the slots that the cell reads and writes."""
        return self.read_slots, self.slot, self.keeps_cache


class CellInputs(NamedTuple):
    """What a cell reads from the site's memory; None for what it does not read."""

    cache: Output = None
    sources: tuple[Output, ...] | None = None  # of a forecast, in its order
    age: torch.Tensor | None = None  # fp32 [B, N] or [1, N], after the latest P cell
    statistic: torch.Tensor | None = None  # of the site's own attention, whose fresh rows it replaces
    scored: torch.Tensor | None = None  # statistic that its tokens are scored by, or random scores [1, N]


class CellResult(NamedTuple):
    """The output of a cell, and what the site's memory keeps of it."""

    out: Output
    cache: Output = None
    age: torch.Tensor | None = None
    statistic: torch.Tensor | None = None
    selected: torch.Tensor | None = None  # int64 [B, k], the recomputed tokens of a cell that chooses


def cells_of(plan: Plan, site: str, observed: frozenset[int]) -> tuple[Cell, ...]:
    """Returns the cells of a site, one a step; observed: steps at which its attention is observed."""
    row, ks = plan.rows[site], iter(plan.k.get(site, ()))
    steps = [step for step, action in enumerate(row) if action == "F"]
    forecasts = dict(zip(steps, plan.forecasts.get(site, ()), strict=True))
    last_use = last_uses({step: forecast.sources for step, forecast in forecasts.items()})
    slots, drops = slots_of(last_use), dropped_at(last_use)
    cells = [
        Cell(
            action,
            k=next(ks) if action == "P" else 0,
            forecast=forecasts.get(step),
            observes=step in observed,
            keeps_cache=next((a for a in row[step + 1 :] if a in "CRP"), "C") != "C",
            slot=slots.get(step),
            read_slots=tuple(slots[source] for source in forecasts[step].sources) if action == "F" else (),
            drops=tuple(drops.get(step, ())),
        )
        for step, action in enumerate(row)
    ]
    return with_tokens(cells, plan.tokens(site))


def with_tokens(cells: Sequence[Cell], tokens: int, share: float = 1.0) -> tuple[Cell, ...]:
    """Returns the cells for a site of so many tokens; each P cell recomputes `share` times as many as before."""
    found: list[Cell] = []
    growth = 0  # steps since the site last computed tokens, at each of which all ages grew by 1
    for cell in cells:
        k = cell.k and min(tokens, max(1, round(cell.k * share)))
        chooses = cell.action == "P" and 0 < k < tokens
        found.append(replace(cell, k=k, chooses=chooses, age_growth=growth if chooses else 0))
        growth = 0 if found[-1].computes else growth + (cell.action in "RPF")
    return tuple(found)


def last_uses(sources: dict[int, tuple[int, ...]]) -> dict[int, int]:
    """Returns {source step: last step that forecasts from it} of {step: its source steps}."""
    last: dict[int, int] = {}
    for step, of_step in sources.items():
        last |= dict.fromkeys(of_step, step)
    return last


def dropped_at(last_use: dict[int, int]) -> dict[int, list[int]]:
    """Returns {step: source steps that it is the last to forecast from}."""
    drops: dict[int, list[int]] = {}
    for source, step in last_use.items():
        drops.setdefault(step, []).append(source)
    return drops


def slots_of(last_use: dict[int, int]) -> dict[int, int]:
    """Returns {source step: number of its slot}, as few slots as are in use at once; a step reads before it writes."""
    slots: dict[int, int] = {}
    for step in sorted(last_use):
        taken = {slot for source, slot in slots.items() if last_use[source] > step}
        slots[step] = next(i for i in range(len(taken) + 1) if i not in taken)
    return slots


def weighted(outputs: Sequence[Output], weights: tuple[float, ...]) -> Output:
    """Returns the weighted sum, in the order given, of tensors or of tuples of tensors."""
    if isinstance(outputs[0], tuple):
        return tuple(weighted(parts, weights) for parts in zip(*outputs, strict=True))
    total = outputs[0] * weights[0]
    for out, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + out * weight
    return total
