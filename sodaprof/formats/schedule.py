"""The schedule in memory: one row a site and one for the stack, one character a step; docs/concepts.md explains each.

`rules.py` holds the rules, `schedule_file.py` reads and writes schedule.json.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, field

from .files import WHOLE, Number, PositiveInt, Record, digest, write_json
from .sampler import LONGEST_HISTORY
from .sites import Sampler, Structure, turn_ages


class Forecast(Record, frozen=True):
    """Σ weights[i] · (output at step sources[i]); weights have at most 6 significant digits."""

    sources: tuple[int, ...]
    weights: tuple[Number, ...]
    form: str = "output"  # in the row `stack`: "output" or "drift"


class Plan(Structure, frozen=True):
    """The part of a schedule for one transformer. Parameters are in the order in which their cells occur in the row."""

    rows: dict[str, str]  # site key -> row, in execution order
    stack: str
    k: dict[str, tuple[int, ...]] = field(default_factory=dict)  # one number a P cell
    forecasts: dict[str, tuple[Forecast, ...]] = field(default_factory=dict)  # one per F cell
    stack_forecasts: tuple[Forecast, ...] = ()  # one per S cell

    def cell(self, site: str, step: int, action: str) -> int:
        """Returns how many `action` cells of the site precede the step: the index into its list of parameters."""
        return self.rows[site].count(action, 0, step)

    def forecast(self, site: str, step: int) -> Forecast:
        """Returns the forecast of an F cell."""
        return self.forecasts[site][self.cell(site, step, "F")]

    def stack_forecast(self, step: int) -> Forecast:
        """Returns the forecast of an S cell."""
        return self.stack_forecasts[self.stack.count("S", 0, step)]

    def computed(self, site: str, step: int) -> int:
        """Returns how many tokens the site computes at a step: all (C), k (P) or none."""
        action = self.rows[site][step]
        if action == "P":
            return self.k[site][self.cell(site, step, "P")]
        return self.tokens(site) if action == "C" else 0

    def column(self, step: int) -> tuple[Any, ...]:
        """Returns all that the plan does at a step; equal columns do the same to the caches."""
        cells: list[Any] = [self.stack_forecast(step) if self.stack[step] == "S" else self.stack[step]]
        for site, row in self.rows.items():
            forecast = self.forecast(site, step) if row[step] == "F" else None
            cells.append((row[step], self.computed(site, step), forecast))
        return tuple(cells)

    def past(self) -> list[int]:
        """Returns how many steps of its turn precede each step, as `turn_ages` counts them."""
        return turn_ages(action != "_" for action in self.stack)

    def counts(self) -> Counter[str]:
        """Returns how many cells of each action the site rows hold; _ is not counted."""
        return Counter("".join(self.rows.values()).replace("_", ""))

    def anchors(self) -> list[int]:
        """Returns the full steps: those at which every site is C."""
        return [t for t, column in enumerate(zip(*self.rows.values(), strict=True)) if set(column) == {"C"}]


class TokenRule(Record, frozen=True):
    """Which tokens a P cell recomputes: those of highest (base + age_weight · age / age_period), then a local bonus."""

    base: str
    age_weight: Number = 0.0
    age_period: Number = 1.0
    bonus: Number = 0.0
    bonus_grid: PositiveInt = 1
    share_halves: bool = False
    seed: Annotated[int, Meta(ge=0, le=WHOLE)] = 0


# how an update was fitted: the key `loop` of `fitted`, and in words
LOOPS = {"open": "open loop", "closed": "closed loop", "joint": "jointly"}


class Update(Record, frozen=True):
    """x <- c0 · x + Σ c_j · V_j + i · x_first in place of the scheduler's own step; coefficients [T][1 + history]."""

    basis: str
    history: Annotated[int, Meta(ge=1, le=LONGEST_HISTORY)]
    coefficients: tuple[tuple[Number, ...], ...]
    fitted: dict[str, Any]
    times: tuple[Number, ...] | None = None  # [T], network times; None: the sampler's timesteps
    initial: tuple[Number, ...] | None = None  # [T], weights of the run's first latents; None: 0


class Schedule(Record, frozen=True):
    """What each site of each transformer does at each step, the sampler that it belongs to, and its origin."""

    transformers: dict[str, Plan]
    sampler: Sampler
    shape: dict[str, Any]  # that the model was inspected with: latent, tokens, batch_profiled, dtype
    policy: dict[str, Any]  # name, knobs
    profile: dict[str, Any] | None = None  # digest, seed and samples of the profile that it was compiled from
    token_rule: TokenRule | None = None
    update: Update | None = None
    predicted: dict[str, Any] | None = None  # unit, speedup, cost, error, cache_bytes
    measured: tuple[dict[str, Any], ...] = ()
    made_by: str = ""

    @property
    def steps(self) -> int:
        return self.sampler.steps

    @property
    def times(self) -> tuple[Number, ...]:
        """The timestep that the network receives at each step."""
        return self.sampler.timesteps if self.update is None or self.update.times is None else self.update.times

    def anchors(self) -> tuple[int, ...]:
        """Returns the full steps: those at which all sites of the transformer that is called are C."""
        return tuple(sorted({t for plan in self.transformers.values() for t in plan.anchors()}))

    def counts(self) -> Counter[str]:
        """Returns how many cells of each action the site rows of all transformers hold."""
        return sum((plan.counts() for plan in self.transformers.values()), Counter())

    def patterns(self) -> list[list[int]]:
        """Returns the steps grouped by what they do, in order of first appearance; step 0 is a group of its own."""
        found: dict[Any, list[int]] = {}
        for step in range(self.steps):
            columns = tuple(plan.column(step) for plan in self.transformers.values())
            found.setdefault((step == 0, columns), []).append(step)
        return list(found.values())

    def digest(self) -> str:
        """Returns the SHA-256 of all that decides what runs: without predictions, measurements and the maker's name."""
        from .schedule_file import schedule_to_json

        data = schedule_to_json(self)
        return digest({key: value for key, value in data.items() if key not in ("predicted", "measured", "made_by")})

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes schedule.json atomically.

        Raises IllegalScheduleError if a rule is broken, FormatError if `path` exists and `force` is not set.
        """
        from .rules import verify
        from .schedule_file import schedule_to_json

        verify(self)
        write_json(Path(path), schedule_to_json(self), force=force)
