"""Measures other caches beside this project's: the same steps computed or as many, on the same pipeline and seeds.

`python -m tests.studies.peers` runs every contender in a process of its own (`tests.studies.peers_worker`), writes
docs/studies/results/peers.json and the table in docs/studies/peers.md. `make bench-peers` makes the environment first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sodaprof.formats.schedule import Schedule
from sodaprof.formats.schedule_file import load_schedule
from tests.studies.peers_page import table, written

SCHEDULES = ("schedules/tiny-dit/fora-2.0x.json", "schedules/tiny-dit/soda-2.0x.json")
EVERY_SECOND = "10" * 10  # random-flux, 20 steps
BY_MASK = ("sodaprof", "sodaprof lowered", "sodaprof mask", "cache-dit F1", "cache-dit F1 Taylor")
BY_THRESHOLD = ("cache-dit threshold", "MagCache", "first-block cache")
BY_SETTING = ("cache-dit F0", "TaylorSeer", "PAB", "FasterCache", "SeaCache")  # once a model

Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """Contenders with one step mask. schedule: the file that the mask is of, None where the mask is all there is."""

    model: str
    name: str
    mask: str
    schedule: str | None = None
    partial: bool = False  # whether the schedule computes some modules in steps that the mask leaves out


def mask_of(schedule: Schedule) -> str:
    """Returns "1" for each step at which every module computes all tokens, else "0"."""
    columns = [column for plan in schedule.transformers.values() for column in plan.rows.values()]
    return "".join("1" if set(cells) == {"C"} else "0" for cells in zip(*columns, strict=True))


def group_of(path: str) -> Group:
    """Returns the group of a tiny-dit schedule file."""
    schedule = load_schedule(path)
    mask = mask_of(schedule)
    rows = [row for plan in schedule.transformers.values() for row in plan.rows.values()]
    partial = any(cell != "R" for row in rows for cell, step in zip(row, mask, strict=True) if step == "0")
    return Group("tiny-dit", Path(path).stem, mask, path, partial)


def contenders_of(group: Group, first: bool) -> Iterator[str]:
    """Yields the contenders of a group; the first group of a model holds those that take neither mask nor threshold."""
    if first:
        yield "plain"  # before all others: it writes the pictures that they are compared with
    for name in (*BY_MASK, *BY_THRESHOLD):
        if name != "sodaprof mask" or group.partial:  # else the schedule is its mask
            yield name
    if first:
        yield from BY_SETTING


def run_groups(
    groups: list[Group], common: dict[str, Any], folder: Path, ask: Ask, only: set[str]
) -> list[dict[str, Any]]:
    """Returns a row a contender: ask(task) is called for each, in turn."""
    rows: list[dict[str, Any]] = []
    for i, group in enumerate(groups):
        first = group.model not in {g.model for g in groups[:i]}
        for name in contenders_of(group, first):
            if only and name not in only | {"plain"}:
                continue
            task = common | {
                "model": group.model, "contender": name, "mask": group.mask, "schedule": group.schedule,
                "reference": str(folder / f"{group.model}.npy"), "out": str(folder / "row.json"),
            }  # fmt: skip
            rows.append({"model": group.model, "group": group.name, "name": name, "commit": commit()} | ask(task))
            shown = rows[-1].get("why") or f"{rows[-1]['speedup']:.2f}x, {rows[-1]['psnr_db']['mean']:.1f} dB"
            print(f"{group.model} {group.name} {name}: {shown}", file=sys.stderr, flush=True)
    return rows


def in_own_process(task: dict[str, Any]) -> dict[str, Any]:
    """Returns the row that a worker writes; one that says so where the worker ends without."""
    out = Path(task["out"])
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.studies.peers_worker"], input=json.dumps(task), text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": str(task["threads"])}, check=False,
    )  # fmt: skip
    if done.returncode or not out.exists():
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no word"])[-1]
        return {"ran": False, "why": f"the process ended with code {done.returncode}: {last[:160]}"}
    return json.loads(out.read_text(encoding="utf-8"))


def merged(result: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Returns the old result with the rows that were measured again, and the commands of both.

    Each row says at which commit it was measured. ValueError where device, threads, versions, seeds or rounds differ: such
    rows cannot stand in one table.
    """
    fixed = [key for key in result if key not in ("commands", "rows", "masks")]
    if different := [key for key in fixed if result[key] != old.get(key)]:
        raise ValueError(f"{different[0]} was {old.get(different[0])!r}, now it is {result[different[0]]!r}")
    place = {(row["model"], row["group"], row["name"]): row for row in result["rows"]}
    rows = [place.pop((row["model"], row["group"], row["name"]), row) for row in old["rows"]]
    masks = old["masks"] | result["masks"]
    return result | {"commands": old["commands"] + result["commands"], "rows": [*rows, *place.values()], "masks": masks}


def commit() -> str | None:
    """Returns the commit that is measured, None outside a repository."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def main(arguments: list[str] | None = None) -> int:
    """Writes the result and the page, and returns the exit code: 1 where a contender of this project did not run."""
    parser = argparse.ArgumentParser(prog="python -m tests.studies.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("schedules", nargs="*", default=SCHEDULES, help="schedules of tiny-dit")
    parser.add_argument("--samples", type=int, default=16, help="held-out seeds")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of the plain pipeline and of the contender")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="measure this again (several times)"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/studies/results/peers.json"))
    parser.add_argument(
        "--page", type=Path, default=Path("docs/studies/peers.md"), help="the page whose table is replaced"
    )
    options = parser.parse_args(arguments)
    groups = [group_of(path) for path in options.schedules]
    groups.append(Group("random-flux", "every second step", EVERY_SECOND))
    common = {"samples": options.samples, "rounds": options.rounds, "threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        rows = run_groups(groups, common, Path(folder), in_own_process, set(options.only))
    environments = [row.pop("environment") for row in rows if "environment" in row]
    result = {
        "format": "sodaprof.peers", "version": 1,
        "commands": [shlex.join(["python", "-m", "tests.studies.peers", *(sys.argv[1:] if arguments is None else arguments)])],
        "machine": platform.machine(), "batch": 1, **common, **(environments or [{}])[0],
        "masks": {f"{g.model} {g.name}": g.mask for g in groups}, "rows": rows,
    }  # fmt: skip
    if options.only and options.output.exists():
        result["rows"] = [row for row in rows if row["name"] in options.only]
        result = merged(result, json.loads(options.output.read_text(encoding="utf-8")))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.page.exists():
        options.page.write_text(written(options.page.read_text(encoding="utf-8"), table(result)), encoding="utf-8")
    print(table(result))
    return int(any(not row["ran"] for row in rows if row["name"].startswith(("plain", "sodaprof"))))


if __name__ == "__main__":
    sys.exit(main())
