"""The schedule: one row a site, one character a step; what each character means, and the file that holds it.

    C  the site computes all tokens and writes its cache
    R  it returns its cache (the module's output before the gate)
    F  it returns a weighted sum of its outputs at earlier C steps
    P  it recomputes k tokens, scatters them into its cache and returns that
    -  it is untouched

The row `stack` says what the blocks do as a whole: `.` they run; `S` they are skipped and the hidden state before the
final norm is forecast; `-` the network is not called, the state moves by the fitted update alone; `_` (in every row) the
pipeline calls another transformer at this step. `verify` in `legal.py` holds the rules.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .files import checked, digest, exact_keys, header, is_number, of_type, read_json, write_json
from .rules import verify
from .sites import Sampler, sampler_from_json, shape_from_json, turn_ages

FORMAT, VERSION = "sodaprof.schedule", 1


@dataclass(frozen=True)
class Forecast:
    """Σ weights[i] · (output at step sources[i]); weights carry 6 significant digits."""

    sources: tuple[int, ...]
    weights: tuple[float, ...]
    form: str = "output"  # for the stack row: "output" or "drift"


@dataclass(frozen=True)
class Plan:
    """One transformer's picture. Parameters stand in the order in which their cells occur in the row."""

    class_name: str
    fingerprint: dict[str, Any]
    rows: dict[str, str]  # site key -> row, in execution order
    stack: str
    k: dict[str, tuple[int, ...]] = field(default_factory=dict)  # one entry a P cell
    forecasts: dict[str, tuple[Forecast, ...]] = field(default_factory=dict)  # one entry an F cell
    stack_forecasts: tuple[Forecast, ...] = ()  # one entry an S cell

    def tokens(self, site: str) -> int:
        """N of the site, from the fingerprint: by module, by site where it is another."""
        tokens = self.fingerprint["tokens"]
        stack, _, module = site.split("#")[0].split(".", 2)
        return tokens[site] if site in tokens else tokens[f"{stack}.{module}"]

    def kind(self, site: str) -> str | None:
        """The canonical kind of the site, from the fingerprint; None where that does not say."""
        stack, _, module = site.split("#")[0].split(".", 2)
        kind: str | None = self.fingerprint.get("kinds", {}).get(f"{stack}.{module}")
        return kind

    def layout(self, site: str) -> str:
        """How the site's output holds its tokens, a name in `models.layout.LAYOUTS`; "" is [B, N, D]."""
        stack, _, module = site.split("#")[0].split(".", 2)
        layout: str = self.fingerprint.get("layouts", {}).get(f"{stack}.{module}", "")
        return layout

    def holds_text(self, site: str) -> bool:
        """Whether the site's tokens are, or hold, those of the text: as many as the prompt is long."""
        stack, _, module = site.split(".", 2)
        return f"{stack}.{module}" in self.fingerprint.get("text", ())

    def cell(self, site: str, step: int, action: str) -> int:
        """Which of the row's `action` cells stands at `step`: the index into its list of parameters."""
        return self.rows[site].count(action, 0, step)

    def column(self, step: int) -> tuple[Any, ...]:
        """All that the plan does at a step: equal columns do the same to what is kept."""
        skips = self.stack[step] == "S"
        cells: list[Any] = [self.stack_forecasts[self.stack.count("S", 0, step)] if skips else self.stack[step]]
        for site, row in self.rows.items():
            action, number = row[step], self.cell(site, step, row[step])
            cells.append((action, self.k[site][number] if action == "P" else None))
            if action == "F":
                cells.append(self.forecasts[site][number])
        return tuple(cells)

    def past(self) -> list[int]:
        """How many steps of its turn went before each step, as `turn_ages` counts them."""
        return turn_ages(action != "_" for action in self.stack)

    def counts(self) -> Counter[str]:
        """How many cells of each action the site rows hold; _ is none."""
        return Counter("".join(self.rows.values()).replace("_", ""))

    def anchors(self) -> list[int]:
        """Steps at which every site is C."""
        return [t for t, column in enumerate(zip(*self.rows.values(), strict=True)) if set(column) == {"C"}]


@dataclass(frozen=True)
class TokenRule:
    """Which tokens a P cell recomputes: those of highest (base + age_weight · age / age_period), then a local bonus."""

    base: str
    age_weight: float = 0.0
    age_period: float = 1.0
    bonus: float = 0.0
    bonus_grid: int = 1
    share_halves: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Update:
    """x <- c0 · x + Σ c_j · V_j in place of the scheduler's own step; coefficients [T][1 + history]."""

    basis: str
    history: int
    coefficients: tuple[tuple[float, ...], ...]
    fitted: dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """What each site of each transformer does at each step, the sampler that it is bound to, and where it comes from."""

    transformers: dict[str, Plan]
    sampler: Sampler
    shape: dict[str, Any]
    policy: dict[str, Any]  # {name, knobs}
    profile: dict[str, Any] | None = None  # {digest, seed, samples} of the profile it was compiled from
    token_rule: TokenRule | None = None
    update: Update | None = None
    predicted: dict[str, Any] | None = None
    measured: tuple[dict[str, Any], ...] = ()
    made_by: str = ""

    @property
    def steps(self) -> int:
        return self.sampler.steps

    def anchors(self) -> tuple[int, ...]:
        """Returns the steps at which all sites of the transformer at work compute."""
        return tuple(sorted({t for plan in self.transformers.values() for t in plan.anchors()}))

    def counts(self) -> Counter[str]:
        return sum((plan.counts() for plan in self.transformers.values()), Counter())

    def patterns(self) -> list[list[int]]:
        """Returns the steps by what they do, in order of first appearance; the first step by itself: it begins a run."""
        found: dict[Any, list[int]] = {}
        for step in range(self.steps):
            columns = tuple(plan.column(step) for plan in self.transformers.values())
            found.setdefault((step == 0, columns), []).append(step)
        return list(found.values())

    def digest(self) -> str:
        """SHA-256 over all that decides what runs: not over what was predicted or measured, nor by whom it was made."""
        data = self.to_json()
        return digest({k: v for k, v in data.items() if k not in ("predicted", "measured", "made_by")})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "transformers": {name: _plan_to_json(plan) for name, plan in self.transformers.items()},
            "update": None if self.update is None else dataclasses.asdict(self.update),
            "token_rule": None if self.token_rule is None else dataclasses.asdict(self.token_rule),
            "sampler": self.sampler.to_json(),
            "shape": self.shape,
            "profile": self.profile,
            "policy": self.policy,
            "predicted": self.predicted,
            "measured": list(self.measured),
            "made_by": self.made_by,
        }

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes the file atomically. Raises IllegalScheduleError, or FormatError where `path` exists without force."""
        verify(self)
        write_json(Path(path), self.to_json(), force=force)


def load_schedule(path: str | Path) -> Schedule:
    """Returns the schedule in `path`. Raises FormatError (a broken file) or IllegalScheduleError (a broken rule)."""
    where = str(path)
    data = header(read_json(Path(path)), FORMAT, VERSION, where)
    schedule = checked(lambda: _schedule_from_json(data, where), where)
    checked(lambda: verify(schedule), where)
    return schedule


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    steps = len(plan.stack)
    shared: list[Any] = [None] * steps  # the column's sources where all its F cells share them, else one list a site
    for step in range(steps):
        cells = {s: plan.forecasts[s][plan.cell(s, step, "F")] for s, row in plan.rows.items() if row[step] == "F"}
        sources = {forecast.sources for forecast in cells.values()}
        if len(sources) == 1:
            shared[step] = list(sources.pop())
        elif sources:
            shared[step] = {site: list(forecast.sources) for site, forecast in cells.items()}
    return {
        "class": plan.class_name,
        "fingerprint": plan.fingerprint,
        "rows": plan.rows,
        "stack": {
            "row": plan.stack,
            "form": [f.form for f in plan.stack_forecasts],
            "sources": [list(f.sources) for f in plan.stack_forecasts],
            "weights": [list(f.weights) for f in plan.stack_forecasts],
        },
        "k": {site: list(k) for site, k in plan.k.items()},
        "forecasts": {
            "sources": shared if any(shared) else [],
            "weights": {site: [list(f.weights) for f in cells] for site, cells in plan.forecasts.items()},
        },
    }


def _plan_from_json(data: Any, where: str) -> Plan:
    exact_keys(data, {"class", "fingerprint", "rows", "stack", "k", "forecasts"}, where)
    stack = exact_keys(data["stack"], {"row", "form", "sources", "weights"}, f"{where}: stack")
    given = exact_keys(data["forecasts"], {"sources", "weights"}, f"{where}: forecasts")
    for row in [*data["rows"].values(), stack["row"]]:
        of_type(row, str, f"{where}: a row")
    forecasts: dict[str, tuple[Forecast, ...]] = {}
    for site, weights in given["weights"].items():
        steps = [t for t, action in enumerate(data["rows"][site]) if action == "F"]
        columns = [given["sources"][t] for t in steps]
        sources = [column[site] if isinstance(column, dict) else column for column in columns]
        forecasts[site] = tuple(Forecast(tuple(s), tuple(w)) for s, w in zip(sources, weights, strict=True))
    return Plan(
        class_name=of_type(data["class"], str, f"{where}: class"),
        fingerprint=of_type(data["fingerprint"], dict, f"{where}: fingerprint"),
        rows=dict(data["rows"]),
        stack=stack["row"],
        k={site: tuple(k) for site, k in data["k"].items()},
        forecasts=forecasts,
        stack_forecasts=tuple(
            Forecast(tuple(s), tuple(w), form)
            for s, w, form in zip(stack["sources"], stack["weights"], stack["form"], strict=True)
        ),
    )


def _check_predicted(data: Any, where: str) -> None:
    exact_keys(data, {"unit", "speedup", "cost", "error", "cache_bytes"}, where)
    of_type(data["unit"], str, f"{where}: unit")
    of_type(data["cache_bytes"], int, f"{where}: cache_bytes")
    for key in ("speedup", "cost", "error"):
        if not (is_number(data[key]) or (key == "error" and data[key] is None)):
            raise FormatError(f"{where}: {key} is {data[key]!r}; expected a number. Write the file again.")


def _schedule_from_json(data: dict[str, Any], where: str) -> Schedule:
    keys = {f.name for f in dataclasses.fields(Schedule)} | {"format", "version"}
    exact_keys(data, keys, where)
    kind: type
    rule, update, profile = data["token_rule"], data["update"], data["profile"]
    if rule is not None:
        exact_keys(rule, {f.name for f in dataclasses.fields(TokenRule)}, f"{where}: token_rule")
        for key, kind in (("base", str), ("share_halves", bool), ("seed", int)):
            of_type(rule[key], kind, f"{where}: token_rule: {key}")
    if update is not None:
        exact_keys(update, {f.name for f in dataclasses.fields(Update)}, f"{where}: update")
        for key, kind in (("basis", str), ("history", int), ("fitted", dict)):
            of_type(update[key], kind, f"{where}: update: {key}")
        update = update | {"coefficients": tuple(tuple(row) for row in update["coefficients"])}
    if profile is not None:
        exact_keys(profile, {"digest", "seed", "samples"}, f"{where}: profile")
        for key, kind in (("digest", str), ("seed", int), ("samples", int)):
            of_type(profile[key], kind, f"{where}: profile: {key}")
        if profile["seed"] < 0 or profile["samples"] < 1:
            raise FormatError(
                f"{where}: profile: seed {profile['seed']} and samples {profile['samples']}; expected at least 0 and 1. "
                "Write the file again."
            )
    policy = exact_keys(data["policy"], {"name", "knobs"}, f"{where}: policy")
    of_type(policy["name"], str, f"{where}: policy: name")
    of_type(policy["knobs"], dict, f"{where}: policy: knobs")
    for record in of_type(data["measured"], list, f"{where}: measured"):
        of_type(record, dict, f"{where}: measured")
    if data["predicted"] is not None:
        _check_predicted(data["predicted"], f"{where}: predicted")
    return Schedule(
        transformers={n: _plan_from_json(p, f"{where}: transformer {n}") for n, p in data["transformers"].items()},
        sampler=sampler_from_json(data["sampler"], f"{where}: sampler"),
        shape=shape_from_json(data["shape"], f"{where}: shape"),
        policy=policy,
        profile=profile,
        token_rule=None if rule is None else TokenRule(**rule),
        update=None if update is None else Update(**update),
        predicted=data["predicted"],
        measured=tuple(data["measured"]),
        made_by=of_type(data["made_by"], str, f"{where}: made_by"),
    )
