"""Makes the files of the comparison that are missing: profiles, schedules, evaluations."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sodaprof.formats.files import digest, read_json, write_json
from sodaprof.formats.schedule_file import load_schedule
from sodaprof.measure.evaluate import REFERENCES, evaluate
from sodaprof.pipelines.load import load_pipeline


@dataclass(frozen=True)
class Variant:
    """A row of the tables. options: of `sodaprof compile`; {model} is put in. ours: set in bold."""

    key: str  # the name of its file
    name: str
    options: str = ""
    ours: bool = False
    refines: str = ""  # the key of what `sodaprof refine` starts from; options are then those of refine
    distances: bool = False  # whether its distance to the data is measured
    latency: bool = False  # whether it is compiled for measured milliseconds too
    robust: bool = False  # whether it is tried beyond calibration


class Maker:
    """Makes files that are missing, in folders of one build."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipes: dict[str, Any] = {}
        self.renewed: set[Path] = set()

    def pipe(self, model: str) -> Any:
        if model not in self.pipes:
            self.pipes[model] = load_pipeline(model, "float32", self.options.device)
        return self.pipes[model]

    def sodaprof(self, *words: str) -> str:
        """Runs a command; returns "" where it is done, the message of an error that sodaprof understands."""
        say(shlex.join(["sodaprof", *words]))
        command = [sys.executable, "-c", "from sodaprof.cli import main; main()", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode not in (0, 1) or "Traceback" in done.stderr:
            raise RuntimeError(f"{shlex.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        said = " ".join(done.stderr.split()).rpartition("sodaprof: ")[2]
        return said or "no word" if done.returncode else ""

    def profile(self, model: str, options: str, folder: Path) -> Path:
        """Returns the folder of a profile with inner products, made unless it is there."""
        if not (folder / "gram.parquet").exists():
            words = ["profile", model, "-o", str(folder), "--force", *options.split()]
            if reason := self.sodaprof(*words):
                raise RuntimeError(f"{shlex.join(words)}: {reason}")
        return folder

    def compile(
        self,
        variants: Sequence[Variant],
        model: str,
        profile: Path,
        budget: float,
        folder: Path,
        cost: Path | None = None,
    ) -> tuple[list[tuple[Variant, Path]], list[dict[str, str]]]:
        """Returns the schedules that there are, and those left out with their reasons."""
        folder.mkdir(parents=True, exist_ok=True)
        made: dict[str, tuple[Variant, Path]] = {}
        left_out = []
        for variant in variants:
            path = folder / f"{variant.key}.json"
            if variant.key in self.options.again and path not in self.renewed:
                self.renewed.add(path)
                for old in folder.glob(f"{variant.key}.*"):
                    old.unlink()
            reason = "" if path.exists() else self._compile(variant, model, profile, budget, path, cost)
            if reason:
                left_out.append({"name": variant.name, "reason": reason})
            else:
                made[variant.key] = variant, path
        return list(made.values()), left_out

    def _compile(
        self, variant: Variant, model: str, profile: Path, budget: float, path: Path, cost: Path | None
    ) -> str:
        options = variant.options.format(model=model).split()
        if variant.refines:
            start = path.with_name(f"{variant.refines}.json")
            if not start.exists():
                return f"there is no {variant.refines} to start from"
            part = path.with_suffix(".part")  # a search that was cut short has written, too, and is gone on with
            reason = self.sodaprof("refine", model, str(start), *options, "-o", str(part))
            if not reason:
                part.replace(path)
                part.with_name(part.name + ".search").unlink(missing_ok=True)
            return reason
        measured = ["--cost", str(cost)] if cost else []
        return self.sodaprof("compile", str(profile), "--budget", f"{budget:g}x", *options, *measured, "-o", str(path))

    def evaluate(
        self, made: Sequence[tuple[Variant, Path]], model: str, budget: float | None, cache: Path, **arguments: Any
    ) -> dict[str, Any]:
        """Returns the evaluation of the schedules beside their controls; what `cache` holds of it is not sampled again."""
        about = {name: value for name, value in arguments.items() if name != "data"}
        key = digest([budget, model, about, self.options.device])
        digests = [load_schedule(path).digest() for _, path in made]
        kept = read_json(cache) if cache.exists() else {}
        if kept.get("key") != key:
            kept = {"key": key, "result": {}, "rows": {}, "controls": []}
        missing = [one for one, which in zip(made, digests, strict=True) if which not in kept["rows"]]
        if missing and kept["rows"]:  # the controls are there, and only what rows are held against is sampled again
            missing += [one for one in made if one[0].key in REFERENCES and one not in missing]
            arguments["controls"] = False
        if missing:
            say(
                f"evaluate {model}{'' if budget is None else f' at {budget:g}x'}: {', '.join(v.key for v, _ in missing)}"
            )
            schedules = [load_schedule(path) for _, path in missing]
            result = evaluate(
                self.pipe(model), schedules, names=[v.name for v, _ in missing], budget=budget,
                batch_size=self.options.batch_size, on_progress=tenths(), **arguments,
            )  # fmt: skip
            del result["pictures"]
            rows = result.pop("rows")
            for row in rows:
                if row.get("executed") != row.get("planned"):
                    raise RuntimeError(f"{row['name']}: planned {row['planned']}, executed {row['executed']}")
            new = {schedule.digest(): row for schedule, row in zip(schedules, rows, strict=False)}
            controls = kept["controls"] or rows[len(schedules) :]
            kept = {"key": key, "result": kept["result"] or result, "rows": new | kept["rows"], "controls": controls}
            write_json(cache, kept, force=True)
        return kept["result"] | {"rows": [*(kept["rows"][which] for which in digests), *kept["controls"]]}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tenths() -> Callable[[int, int], None]:
    """Returns a callback that says how far an evaluation is, about ten times."""
    said = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal said
        if done * 10 // total > said:
            said = done * 10 // total
            say(f"  {done} of {total} samples")

    return on_progress
