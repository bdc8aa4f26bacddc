"""What a pipeline is called with: class labels or prompts, from the command line, a file, or the model itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError, SodaprofError
from ..formats.disk import read_bytes
from ..formats.files import MAX_BYTES

# in an installed package, and in the repository
PROMPT_FOLDERS = [Path(__file__).parents[level] / "calibration_prompts" for level in (1, 2)]
LABEL_DIGITS = 18  # of a label: it is a 64-bit integer


def call_defaults(pipe: Any) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(pipe.__call__).parameters.items()}


def takes_labels(pipe: Any) -> bool:
    """Whether the pipeline is called with class labels rather than prompts."""
    return "class_labels" in call_defaults(pipe)


def makes_video(pipe: Any) -> bool:
    """Whether the pipeline is called with a number of frames."""
    return bool({"num_frames", "video_length"} & set(call_defaults(pipe)))


def read_prompts(path: str | Path) -> list[int | str]:
    """Returns the entries of a prompt file, or of a shipped one by its name (`text-to-image`).

    One entry a line, # comments, integers are labels. Raises FormatError if there is none.
    """
    shipped = [folder / f"{path}.txt" for folder in PROMPT_FOLDERS]
    path = next((p for p in shipped if p.is_file()), Path(path))
    try:
        lines = [line.strip() for line in read_bytes(path, MAX_BYTES).decode("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:  # bytes that are no UTF-8 are a ValueError
        raise FormatError(
            f"{path}: not readable ({error}). Give a text file with one prompt or label a line."
        ) from None
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise FormatError(f"{path}: no prompts. Write one prompt (or one integer label) a line.")
    if long := [e for e in entries if e.removeprefix("-").isdecimal() and len(e) > LABEL_DIGITS]:
        raise FormatError(
            f"{path}: {long[0][:20]}… is a number of {len(long[0])} digits; labels have at most {LABEL_DIGITS}. Shorten it, or "
            "add a letter to make it a prompt."
        )
    return [int(e) if e.removeprefix("-").isdecimal() else e for e in entries]


def label_names(pipe: Any) -> dict[str, int]:
    """Returns the label of each name that the pipeline gives to its classes; {} if it gives none."""
    named = getattr(pipe, "labels", None) or {n: label for label, n in (pipe.config.get("id2label") or {}).items()}
    return {str(name): int(label) for name, label in named.items()}


def check_entries(pipe: Any, entries: Sequence[int | str], give: str | None = None) -> list[int | str]:
    """Returns prompts as they are, labels for labels and their names; SodaprofError, which advises `give`, for others."""
    if not takes_labels(pipe):
        if wrong := [e for e in entries if not isinstance(e, str)]:
            raise SodaprofError(
                f"{type(pipe).__name__} takes text prompts; found {wrong[0]!r}. Give {give or 'others: --prompts FILE'}"
            )
        return list(entries)
    names = label_names(pipe)
    found = [names.get(e.strip(), e) if isinstance(e, str) else e for e in entries]
    if unnamed := [e for e in found if isinstance(e, str)]:
        give = give or "others: --labels 0-9, or --prompts FILE"
        known = f"which is none of its names ({_few([*names])})" if names else "and it has no names for them"
        raise SodaprofError(
            f"{type(pipe).__name__} takes integer labels; found {unnamed[0][:80]!r}, {known}. Give {give}"
        )
    labels = sorted(set(names.values())) or list(range(int(pipe.transformer.config.get("num_embeds_ada_norm") or 0)))
    if unknown := [e for e in found if labels and e not in labels]:
        known = f"{labels[0]} to {labels[-1]}" if labels[-1] - labels[0] == len(labels) - 1 else _few(labels)
        raise SodaprofError(f"Found the label {unknown[0]}; this model knows {known}. Give one of these.")
    return found


def _few(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values if len(values) <= 12 else [*values[:5], "…", values[-1]]))


def default_entries(pipe: Any) -> tuple[list[int | str], str]:
    """Returns the entries that a model is profiled and evaluated on if none are given, and where they are from.

    SodaprofError for a model of labels without names: which of them it was trained on is unknown.
    """
    names = label_names(pipe) if takes_labels(pipe) else {}
    if takes_labels(pipe) and not names:
        raise SodaprofError(
            f"{type(pipe).__name__} takes labels and does not say which it was trained on (no id2label, no labels). Say so: "
            "--labels 0-9, or --prompts FILE with a label a line; in Python prompts=range(10)."
        )
    own_list = Path(str(pipe.config.get("_name_or_path", ""))).name
    if any((folder / f"{own_list}.txt").is_file() for folder in PROMPT_FOLDERS):
        return read_prompts(own_list), f"the shipped list {own_list}"
    if not takes_labels(pipe):
        name = "text-to-video" if makes_video(pipe) else "text-to-image"
        return read_prompts(name), f"the shipped list {name}"
    if names.get("golden retriever") == 207:
        return read_prompts("imagenet-labels"), "the shipped list imagenet-labels"
    own = sorted(set(names.values()))
    return list(own[:: math.ceil(len(own) / 100)]), "the names that the model has for its labels"


def default_prompts(pipe: Any) -> list[int | str]:
    """Returns the entries of `default_entries`."""
    return default_entries(pipe)[0]


def any_entries(pipe: Any) -> list[int | str]:
    """Returns entries that the pipeline takes, for what is the same for all of them: `default_prompts`, or label 0."""
    return [0] if takes_labels(pipe) and not label_names(pipe) else default_prompts(pipe)
