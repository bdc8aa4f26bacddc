"""schedule.json, versions 1 and 2: a schedule is read from it, checked against the rules, and written to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, field
from msgspec.structs import replace

from ..errors import FormatError
from .files import REWRITE, WHOLE, Figure, Number, PositiveInt, Record, decode, encode, header, read_json
from .rules import verify
from .sampler import MAX_HISTORY, OUTPUT_BASED
from .schedule import Forecast, Plan, Schedule
from .sites import Index, Shape, check_seed

FORMAT = "sodaprof.schedule", 2
SINCE_2 = ("times", "initial")  # keys of `update`
KEYS = (
    "transformers", "update", "token_rule", "sampler", "shape", "profile", "policy", "predicted", "measured", "made_by",
)  # fmt: skip
Sources = tuple[Index, ...]
Weights = tuple[Number, ...]


class StackFile(Record, frozen=True):
    """The row `stack`; one form, list of sources and list of weights for each of its S cells."""

    row: str
    form: tuple[str, ...]
    sources: tuple[Sources, ...]
    weights: tuple[Weights, ...]


class ForecastsFile(Record, frozen=True):
    """The F cells. sources: [] or one entry a step: the sources that all F cells of the step share, or those of each site."""

    sources: tuple[Sources | dict[str, Sources] | None, ...]
    weights: dict[str, tuple[Weights, ...]]


class PlanFile(Record, frozen=True):
    """One transformer of a schedule as the file holds it."""

    class_name: str = field(name="class")
    fingerprint: dict[str, Any]
    rows: dict[str, str]
    stack: StackFile
    k: dict[str, tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...]]
    forecasts: ForecastsFile


class Policy(Record, frozen=True):
    """The policy that made a schedule, and its settings."""

    name: str
    knobs: dict[str, Any]


class ProfileReference(Record, frozen=True):
    """The profile that a schedule was compiled from."""

    digest: str
    seed: Annotated[int, Meta(ge=0)]
    samples: PositiveInt

    def __post_init__(self) -> None:
        check_seed(self.seed)


class Predicted(Record, frozen=True):
    """What the compiler predicted; `error` is null for a policy without an error model."""

    unit: str
    speedup: Figure
    cost: Figure
    error: Figure | None
    cache_bytes: Annotated[int, Meta(ge=0, le=WHOLE)]


PARTS: dict[str, Any] = {  # keys whose value is an object of known keys, and a plain dict in memory
    "shape": Shape,
    "policy": Policy,
    "profile": ProfileReference | None,
    "predicted": Predicted | None,
}


def load_schedule(path: str | Path) -> Schedule:
    """Returns the schedule in `path`. Raises FormatError (a broken file) or IllegalScheduleError (a broken rule)."""
    schedule = schedule_from_json(read_json(Path(path)), str(path))
    verify(schedule)
    return schedule


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """Returns the content of schedule.json."""
    plans = {name: encode(_plan_file(plan)) for name, plan in schedule.transformers.items()}
    data, version = encode(replace(schedule, transformers={})) | {"transformers": plans}, version_of(schedule)
    if version == 1 and schedule.update is not None:
        data["update"] = {key: value for key, value in data["update"].items() if key not in SINCE_2}
    return {"format": FORMAT[0], "version": version} | {key: data[key] for key in KEYS}


def version_of(schedule: Schedule) -> int:
    """Returns the version of the schedule's file: the lowest that can hold its update."""
    update = schedule.update
    if update is None:
        return 1
    other_basis = update.basis == "data" and schedule.sampler.class_name in OUTPUT_BASED
    has_more = update.times is not None or update.initial is not None or update.history > MAX_HISTORY
    return 2 if has_more or other_basis else 1


def schedule_from_json(data: Any, where: str) -> Schedule:
    """Returns the schedule that `schedule_to_json` wrote, without checking the rules; FormatError for anything else."""
    content = header(data, FORMAT, where)
    version, update = data["version"], content.get("update")
    if version == 1 and isinstance(update, dict):
        if found := [key for key in SINCE_2 if key in update]:
            raise FormatError(f"{where}: update: version 1 has no key `{found[0]}`. {REWRITE}")
        content["update"] = update | dict.fromkeys(SINCE_2)
    files = decode(content.get("transformers"), dict[str, PlanFile], f"{where}: transformers")
    plans = {name: _plan(file, f"{where}: transformers: {name}") for name, file in files.items()}
    for key, kind in PARTS.items():
        decode(content.get(key), kind, f"{where}: {key}")
    schedule = replace(decode(content | {"transformers": {}}, Schedule, where), transformers=plans)
    if version == 1 and schedule.update is not None and schedule.update.history > MAX_HISTORY:
        raise FormatError(f"{where}: update: in version 1 its history is at most {MAX_HISTORY}. {REWRITE}")
    return schedule


def _plan_file(plan: Plan) -> PlanFile:
    columns: list[Sources | dict[str, Sources] | None] = []
    for step in range(len(plan.stack)):
        sources = {site: plan.forecast(site, step).sources for site, row in plan.rows.items() if row[step] == "F"}
        columns.append(sources if len({*sources.values()}) > 1 else next(iter(sources.values()), None))
    skips = plan.stack_forecasts
    stack = StackFile(
        plan.stack, tuple(f.form for f in skips), tuple(f.sources for f in skips), tuple(f.weights for f in skips)
    )
    weights = {site: tuple(f.weights for f in cells) for site, cells in plan.forecasts.items()}
    forecasts = ForecastsFile(tuple(columns) if any(columns) else (), weights)
    return PlanFile(plan.class_name, plan.fingerprint, plan.rows, stack, plan.k, forecasts)


def _plan(file: PlanFile, where: str) -> Plan:
    forecasts = {}
    for site, weights in file.forecasts.weights.items():
        columns = [c for t, c in enumerate(file.forecasts.sources) if file.rows.get(site, "")[t : t + 1] == "F"]
        sources = [column.get(site) if isinstance(column, dict) else column for column in columns]
        forecasts[site] = _cells(sources, weights, ["output"] * len(weights), f"{where}: forecasts of {site}")
    stack = file.stack
    skips = _cells(stack.sources, stack.weights, stack.form, f"{where}: stack")
    return Plan(file.class_name, file.fingerprint, file.rows, stack.row, file.k, forecasts, skips)


def _cells(
    sources: Sequence[Sources | None], weights: Sequence[Weights], forms: Sequence[str], where: str
) -> tuple[Forecast, ...]:
    found = [s for s in sources if s is not None]
    if not len(found) == len(sources) == len(weights) == len(forms):
        counts = f"{len(found)} lists of sources and {len(weights)} of weights"
        raise FormatError(f"{where}: found {counts}; expected one of each for each cell. {REWRITE}")
    return tuple(Forecast(*cell) for cell in zip(found, weights, forms, strict=True))
