"""Schedules next to the weights: `MODEL/sodaprof/*.json`, in a folder or in a hub repository."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..errors import MismatchError, SodaprofError
from ..formats.files import refuse_existing
from ..formats.schedule import Schedule
from ..formats.schedule_file import load_schedule
from ..pipelines.load import find_model, load_pipeline
from .checks import check_matches

FOLDER = "sodaprof"


def ship(schedule: str | Path, model: str | Path, *, force: bool = False) -> Path:
    """Copies a schedule to the folder of the pipeline that it is for, and returns the copy's path.

    Raises SodaprofError if `model` is no folder of a pipeline, MismatchError if the schedule does not match it, FormatError
    if the file exists and `force` is not set.
    """
    folder = find_model(str(model))
    if isinstance(folder, str):
        raise SodaprofError(
            f"{model} is a hub id. Ship to a local folder of the model, then upload its folder {FOLDER}/."
        )
    copied = folder / FOLDER / Path(schedule).with_suffix(".json").name
    refuse_existing(copied, force)  # ahead of loading the model
    loaded = load_schedule(schedule)
    check_matches(load_pipeline(str(model), device="cpu"), loaded)
    loaded.save(copied, force=force)
    return copied


def find_shipped(pipe: Any, steps: int | None = None) -> Path:
    """Returns the file of the one schedule next to the pipeline's weights that matches it (and the number of steps, if given).

    Raises SodaprofError if none or several do, and lists them.
    """
    where = str(getattr(pipe, "name_or_path", None) or getattr(pipe.config, "_name_or_path", None) or "")
    if not where:
        raise SodaprofError(
            "This pipeline was not loaded from a folder or the hub, so no schedule is shipped with it. Give a schedule: "
            "sodaprof.apply(pipe, 'schedule.json')"
        )
    files = sorted(path for path in _folder_of(where).glob("*.json") if not path.name.startswith("."))
    if not files:
        raise SodaprofError(
            f"{where} ships no schedules ({FOLDER}/*.json). Name a file, or put one there: "
            f"sodaprof ship schedule.json {where}"
        )
    schedules, reasons = {}, {}
    for path in files:
        try:
            schedules[path] = load_schedule(path)
        except SodaprofError as error:  # one broken or newer file does not hide the others
            reasons[path] = str(error)
    broken = [*reasons]
    reasons |= {path: reason for path, schedule in schedules.items() if (reason := _mismatch(pipe, schedule, steps))}
    matching = [path for path in files if path not in reasons]
    if not matching:
        listed = "\n".join(f"  {path.name}: {reason}" for path, reason in reasons.items())
        raise MismatchError(f"No schedule shipped with {where} matches:\n{listed}")
    if len(matching) > 1:
        listed = "\n".join(f"  {path}: {_summary(schedules[path])}" for path in matching)
        raise SodaprofError(
            f"{where} ships {len(matching)} schedules that match. Name one, or give the number of steps:\n{listed}"
        )
    for path in broken:
        warnings.warn(f"A schedule next to the weights is left out. {reasons[path]}", stacklevel=2)
    return matching[0]


def _folder_of(where: str) -> Path:
    """Returns the folder of schedules of a model, fetched if the model is a hub id; it need not exist."""
    if Path(where).is_dir():
        return Path(where) / FOLDER
    from huggingface_hub import snapshot_download  # `from_pretrained` does not fetch files that it does not know

    try:
        return Path(snapshot_download(where, allow_patterns=[f"{FOLDER}/*.json"])) / FOLDER
    except Exception as error:  # the hub's client raises whatever its parts raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise SodaprofError(
            f"{where}: its shipped schedules are neither in this machine's cache nor fetched from the hub ({reason}). "
            "Check the network, or name a schedule file."
        ) from None


def _mismatch(pipe: Any, schedule: Schedule, steps: int | None) -> str | None:
    if steps is not None and schedule.steps != steps:
        return f"it is for {schedule.steps} steps, not {steps}"
    try:
        check_matches(pipe, schedule)
    except SodaprofError as error:
        return str(error)
    return None


def _summary(schedule: Schedule) -> str:
    predicted = schedule.predicted or {}
    speed = f", {predicted['speedup']:.2f}x {predicted['unit']}" if "speedup" in predicted else ""
    return f"{schedule.policy['name']}, {schedule.steps} steps{speed}"
