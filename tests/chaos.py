"""`python -m tests.chaos`: kills, interrupts, a full disk, a read-only folder and two runs at once lose no file.

`profile` and `refine` on tiny-dit are ended at random moments and repeated: they must come to the files of an uninterrupted
run, byte for byte. Prints each fault, then one summary line; exits 1 if there is a fault. A run is a forked child, so that
torch is imported once. Linux alone: mounts are made in a user namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sodaprof import cli, load_schedule
from sodaprof.pipelines.load import load_pipeline
from sodaprof.profiler import run as _run  # noqa: F401
from sodaprof.tuning import refine as _refine  # noqa: F401

NEW_NAMESPACES = 0x10000000 | 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS
READ_ONLY, REMOUNT, BIND = 1, 32, 4096  # MS_RDONLY, MS_REMOUNT, MS_BIND
SIZES = {"profile": (8, 40, 100, 160), "refine": (4, 8, 12, 16)}  # KiB of a disk that is too small, at some moment
LIMIT = 300  # seconds of a run
ENDING = 15  # seconds from an interrupt to the end of the run, on a machine that does other work too
PROFILE = ("profile", "tiny-dit", "--steps", 6, "--samples", 4, "--batch-size", 1, "--max-interval", 3)
SAID = "said.txt"  # what the runs print


class Fault(AssertionError):
    """What must not happen."""


def require(condition: Any, message: str) -> None:
    if not condition:
        raise Fault(message)


class Place:
    """A folder in which commands run, next to the folder of the reference files."""

    def __init__(self, folder: Path, reference: Path) -> None:
        self.folder, self.reference = folder, reference

    def command(self, verb: str) -> tuple[Any, ...]:
        if verb == "profile":
            return (*PROFILE, "-o", self.folder / "p")
        begin = ("refine", "tiny-dit", self.reference / "s.json", "--evaluations", 3, "--samples", 4)
        return (*begin, "-o", self.folder / "r.json")

    def start(self, *arguments: Any) -> int:
        """Starts a command in a child and returns its process id."""
        if (child := os.fork()) == 0:
            said = os.open(self.folder.with_name(f"{self.folder.name}.{SAID}"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv, code = ["sodaprof", *map(str, arguments)], 99
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        return child

    def wait(self, child: int, seconds: float = LIMIT) -> int:
        """Returns the exit code, negative for a signal; kills the child and raises if it does not end in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise Fault(f"has not ended after {seconds} s: {self.said()}")

    def run(self, *arguments: Any, code: int = 0) -> str:
        """Runs a command that must end with this code, and returns what it printed; never a traceback."""
        found = self.wait(self.start(*arguments))
        require(found == code, f"exit code {found}, expected {code}: {self.said()}")
        return self.said()

    def said(self) -> str:
        text = self.folder.with_name(f"{self.folder.name}.{SAID}").read_text(errors="replace")
        require("Traceback" not in text, f"traceback: {text[-600:]}")
        return text[-400:]

    def changes(self) -> frozenset[tuple[str, int]]:
        found = set()
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((str(path), path.stat().st_mtime_ns))
        return frozenset(found)

    def check(self, verb: str) -> None:
        """Raises unless the folder holds exactly the reference files."""
        names = ("p/",) if verb == "profile" else ("r.json",)
        wanted = {n: c for n, c in contents(self.reference).items() if n.startswith(names)}
        found = contents(self.folder)
        require(found.keys() == wanted.keys(), f"other files: {sorted(found.keys() ^ wanted.keys())}")
        require(not (odd := [n for n in wanted if found[n] != wanted[n]]), f"other bytes than uninterrupted: {odd}")


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files under a folder; of a manifest without what it says about time, which differs between runs."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    for name in found:
        if name.endswith("manifest.json"):
            data = json.loads(found[name])
            data["measured"].clear()
            found[name] = json.dumps(data).encode()
    return found


def ended(place: Place, verb: str, number: int, seconds: float, draw: random.Random) -> None:
    """Ends a run by signal `number` at a random moment, or as its files change; the repeated command must complete it."""
    for _ in range(draw.choice([1, 1, 2])):
        child, began = place.start(*place.command(verb)), time.monotonic()
        after, changes, before = draw.uniform(0, seconds), draw.choice([None, draw.randint(1, 12)]), place.changes()
        while changes is None or changes:
            if changes is None and time.monotonic() - began >= after:
                break
            if changes is not None and (now := place.changes()) != before:
                before, changes = now, changes - 1
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break  # it was quicker
            time.sleep(0.0005)
        unfinished = verb == "profile" and not (place.folder / "p").exists()
        os.kill(child, number)  # it has not been waited for, so that the id is still its own
        code = place.wait(child, ENDING)
        allowed = {signal.SIGKILL: (0, -9), signal.SIGINT: (0, 130), signal.SIGTERM: (0, 130, 143, -15)}[number]
        require(code in allowed, f"exit code {code}, expected one of {allowed}: {place.said()}")
        require(code or not unfinished, f"signal {number} was dropped: {place.said()}")
        if (file := place.folder / "r.json").exists():
            load_schedule(file)
        if (place.folder / "p").exists():
            break  # the profile is complete, and is not made twice
    if verb == "refine" or not (place.folder / "p").exists():
        place.run(*place.command(verb))
    place.check(verb)


def full_disk(place: Place, verb: str, size: int) -> None:
    """On a small disk the command ends in one message; with more room the same command completes."""
    mount(b"tmpfs", place.folder, b"tmpfs", 0, f"size={size}k".encode())
    code = place.wait(place.start(*place.command(verb)))
    said = place.said()
    if code:
        require(code == 1 and "full" in said, f"{size} KiB: exit code {code}: {said}")
        require(not (place.folder / "p").exists(), f"{size} KiB: the profile is there, incomplete")
        mount(b"tmpfs", place.folder, b"tmpfs", REMOUNT, b"size=64m")
        place.run(*place.command(verb))
    place.check(verb)


def read_only(place: Place, verb: str) -> None:
    """In a read-only folder the command ends in one message that says so."""
    target = bytes(place.folder)
    mount(target, place.folder, b"", BIND, b"")
    mount(target, place.folder, b"", BIND | REMOUNT | READ_ONLY, b"")
    said = place.run(*place.command(verb), code=1).lower()
    require("read-only" in said or "may not be written" in said, f"not said to be read-only: {said}")


def mount(source: bytes, target: Path, kind: bytes, flags: int, options: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, bytes(target), kind or None, ctypes.c_ulong(flags), options or None):
        raise OSError(ctypes.get_errno(), "mount")


def mounted(trial: Callable[..., None], *arguments: Any) -> None:
    """Runs a trial in a child with mounts of its own."""
    result = arguments[0].folder.with_name(arguments[0].folder.name + ".result")
    if (child := os.fork()) == 0:
        user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
        try:
            if libc.unshare(NEW_NAMESPACES):
                raise OSError(ctypes.get_errno(), "unshare")
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            trial(*arguments)
            result.write_text("")
        except BaseException as error:
            result.write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    os.waitpid(child, 0)
    require(not (said := result.read_text()), said)


def two_at_once(place: Place, verb: str, draw: random.Random) -> None:
    """Of two runs into one place one ends well, the other too or in one message; the files are those of one run."""
    first = place.start(*place.command(verb))
    time.sleep(draw.choice([0, 0, draw.uniform(0, 3)]))
    codes = [place.wait(child) for child in (place.start(*place.command(verb)), first)]
    require(sorted(codes) in ([0, 0], [0, 1]), f"exit codes {codes}: {place.said()}")
    place.check(verb)
    place.run(*place.command(verb), *["--force"] * (verb == "profile"))
    place.check(verb)


def appears(place: Place) -> None:
    """A folder of another's that appears while `profile` runs stays."""
    child = place.start(*place.command("profile"))
    while not place.changes():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise Fault(f"ended before it wrote a file: {place.said()}")
        time.sleep(0.001)
    (place.folder / "p").mkdir()
    (place.folder / "p" / "notes.txt").write_text("kept")
    code = place.wait(child)
    require((place.folder / "p" / "notes.txt").exists(), f"exit code {code}, and the file of another is gone")
    require(code == 1, f"exit code {code}: {place.said()}")


def trial(task: tuple[str, str, int, Path, float]) -> str | None:
    """Makes one trial in a folder of its own and returns its fault."""
    kind, verb, number, root, seconds = task
    place, draw = Place(root / f"{kind}-{verb}-{number}", root / "reference"), random.Random(f"{kind} {verb} {number}")
    place.folder.mkdir()
    try:
        if kind == "full disk":
            mounted(full_disk, place, verb, SIZES[verb][number // 2 % 4])
        elif kind == "read-only":
            mounted(read_only, place, verb)
        elif kind == "two at once":
            two_at_once(place, verb, draw)
        elif kind == "appears":
            appears(place)
        else:
            ended(place, verb, getattr(signal, kind), seconds, draw)
        shutil.rmtree(place.folder)
    except Exception as error:  # a fault, or a fault of the trial: both are reported
        return f"{kind} of {verb}, trial {number}: {type(error).__name__}: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; other trials follow in proportion")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    share = given.kills / 100
    counts = {
        "SIGKILL": 100,
        "SIGINT": 10,
        "SIGTERM": 10,
        "full disk": 8,
        "read-only": 2,
        "two at once": 6,
        "appears": 1,
    }
    counts = {kind: max(round(count * share), 2 - (kind == "appears")) for kind, count in counts.items()}
    for name in ("pyarrow.parquet", "rich.progress", "scipy.linalg", "scipy.optimize"):  # as torch, ahead of the forks
        importlib.import_module(name)
    load_pipeline("tiny-dit")  # which imports the classes of its parts
    began, faults = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="sodaprof-chaos-") as name:
        reference = Place(Path(name) / "reference", Path(name) / "reference")
        reference.folder.mkdir()
        seconds = {}
        for verb in ("profile", "refine"):
            start = time.monotonic()
            reference.run(*reference.command(verb))
            seconds[verb] = time.monotonic() - start
            if verb == "profile":
                reference.run("compile", reference.folder / "p", "--budget", "2.0x", "-o", reference.folder / "s.json")
        verbs = [("profile", "refine")[i % 2] for i in range(max(counts.values()))]
        tasks = [(k, verbs[i], i, Path(name), seconds[verbs[i]]) for k, count in counts.items() for i in range(count)]
        with multiprocessing.get_context("fork").Pool(given.processes) as pool:
            for fault in pool.imap_unordered(trial, tasks):
                if fault is not None:
                    faults += 1
                    print(fault, flush=True)
    done = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"chaos: {done}, {time.monotonic() - began:.0f} s: {faults or 'no'} fault{'s' * (faults != 1)}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
