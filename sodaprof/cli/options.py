"""Options that commands share, and checks of their values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SodaprofError


def ranged(least: float, most: float) -> Callable[[typer.CallbackParam, Any], Any]:
    """Returns the callback of an option whose value, if given, is a number from `least` to `most`."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not least <= value <= most:
            wanted = f"at least {least:,}" if value < least else f"{least:,} to {most:,}"
            raise SodaprofError(f"{max(param.opts, key=len)} is {value}; expected {wanted}.")
        return value

    return check


SampleRange, EvalRange = ranged(1, 1_000_000), ranged(2, 1_000_000)
BatchRange, StepRange, SeedRange, PixelRange = (
    ranged(1, 65_536),
    ranged(1, 10_000),
    ranged(0, 2**64 - 1),
    ranged(1, 65_536),
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A pipeline folder, a shipped reference model, or a hub id a/b.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …  [default: cuda if there is one]")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16  [default: float32 on a CPU, else bfloat16]")
]
Scale = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        callback=ranged(0, 10_000),
        help="Guidance.  [default: the schedule's, or the pipeline's]",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="One prompt or label a line, or a shipped list: text-to-image.  [default: by model]"
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Class labels, for a model that takes them: 0-9, 0,3,5-7, or names that it has."),
]
ResultFile = Annotated[Path | None, typer.Option("-o", "--output", help="Write the result as JSON.")]
ScheduleFile = Annotated[Path, typer.Argument(metavar="FILE", help="A schedule.")]
Batch = Annotated[int, typer.Option(callback=BatchRange, help="Generations sampled at once.")]
Runtime = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="hooks; compiled: traced blocks, faster from the second run on, CUDA graphs on a GPU; whole-steps: compiled, "
        "with guidance and the scheduler's step in the graph.",
    ),
]
NoGraphs = Annotated[bool, typer.Option("--no-graphs", help="Run without CUDA graphs on a GPU.")]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="CLASS", help="A scheduler of diffusers to sample with.  [default: the pipeline's own]"),
]
Steps = Annotated[int | None, typer.Option(callback=StepRange, help="Sampling steps.  [default: the pipeline's]")]
Cost = Annotated[str, typer.Option(help="Unit of the budget: flops, or a cost.json of measured milliseconds.")]
MaxCache = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Limit for the caches of one generation: 2GB, 500MB.")
]


def check_outputs(paths: dict[str, Path | None], force: bool) -> None:
    """Raises SodaprofError unless all files that these options name can be written, and are different ones."""
    from ..formats.files import refuse_existing

    options: dict[str, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        refuse_existing(path, force)
        if (other := options.setdefault(os.path.realpath(path), option)) != option:
            raise SodaprofError(f"{other} and {option} are both {path}. Give each a file of its own.")


def entries(prompts: str | None, labels: str | None = None) -> tuple[list[int | str], str] | None:
    """Returns the entries of a prompt file or of --labels, and where they are from; None if neither is given."""
    from ..pipelines.entries import read_prompts

    if prompts is not None and labels is not None:
        raise SodaprofError("--prompts and --labels both say what to sample. Give one of them.")
    if labels is not None:
        return parse_labels(labels), f"--labels {labels}"
    return None if prompts is None else (read_prompts(prompts), prompts)


def say_entries(console: Any, pipe: Any, given: tuple[list[int | str], str] | None) -> list[int | str]:
    """Prints which prompts or labels are taken, how many and from where, and returns them; by default the model's."""
    from ..pipelines.entries import check_entries, default_entries, takes_labels

    found, source = given or default_entries(pipe)
    found = check_entries(pipe, found)
    kind = "labels" if takes_labels(pipe) else "prompts"
    shown = [str(entry)[:40] for entry in (found if len(found) <= 12 else found[:3])]
    console.print(
        f"{len(found)} {kind} from {source}: {', '.join(shown)}{'' if len(found) <= 12 else ' …'}",
        soft_wrap=True,
        markup=False,
    )
    return found


def parse_labels(text: str) -> list[int | str]:
    """Returns the labels of a list such as 0-9 or 0,3,5-7; other parts are names. SodaprofError for a broken range."""
    found: list[int | str] = []
    for part in map(str.strip, text.split(",")):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        first, last = (0, 0) if ends is None else (int(ends[1]), int(ends[2] or ends[1]))
        if not part or first > last:
            raise SodaprofError(f"--labels is {text[:80]!r}; expected labels and ranges, as in --labels 0-9 or 0,3,5-7")
        found += [part] if ends is None else range(first, last + 1)
    return found


def check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raises SodaprofError unless the option has one of the allowed values."""
    if value not in allowed:
        *others, last = allowed
        raise SodaprofError(f"{option} is {value!r}; expected {', '.join(others)} or {last}.")


def parse_size(text: str | None) -> int | None:
    """Returns the bytes of a size such as 2GB or 500MB. Raises SodaprofError for other text."""
    return None if text is None else int(_parse(text, {"KB": 10**3, "MB": 10**6, "GB": 10**9}, "--max-cache", "2GB"))


def parse_span(text: str | None) -> float | None:
    """Returns the seconds of a time such as 90s, 5m or 1h. Raises SodaprofError for other text."""
    return None if text is None else _parse(text, {"S": 1, "M": 60, "H": 3600}, "--time", "5m")


def _parse(text: str, units: dict[str, int], option: str, example: str) -> float:
    for unit, factor in units.items():
        number = text.strip().upper().removesuffix(unit)
        if text.strip().upper().endswith(unit):
            try:
                if 0 < float(number) * factor <= 2**63:
                    return float(number) * factor
            except ValueError:
                break
    raise SodaprofError(f"{option} is {text!r}; expected a number above 0 with its unit, as in {option} {example}")
