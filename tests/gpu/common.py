"""What the parts share: results written as they come, networks, timed runs of a pipeline."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from sodaprof.formats.files import write_json
from sodaprof.formats.schedule import Schedule
from sodaprof.pipelines.device import device_facts, launches_of, versions
from sodaprof.pipelines.load import call
from sodaprof.pipelines.patch import patched
from tests.tape import Tapes


@dataclass(frozen=True)
class Settings:
    """The settings of a part."""

    part: str
    out: Path
    device: str
    rehearsal: bool  # tiny networks, few steps; a tape in place of CUDA graphs unless on a GPU

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def repeats(self) -> int:
        """Returns how often a graph that is timed alone is replayed."""
        return 1 if self.rehearsal else 20

    def rounds(self, count: int) -> int:
        """Returns how many runs are timed: `count`, in a rehearsal one."""
        return 1 if self.rehearsal else count

    def recorder(self) -> Any:
        """Returns what `Compiled(graphs=...)` takes."""
        return True if self.cuda else Tapes()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def settings_of(part: str) -> Settings:
    """Returns the settings on the command line of a part."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.gpu.{part}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearsal", action="store_true")
    given = parser.parse_args()
    return Settings(part, given.out, given.device, given.rehearsal)


class Results:
    """The JSON of a part, written anew after every entry: if a part is stopped, the file holds what it has measured."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.out / f"{settings.part}.json"
        self.data: dict[str, Any] = {
            "format": "sodaprof.gpu", "version": 1, "part": settings.part, "device": settings.device,
            "rehearsal": settings.rehearsal, "hardware": device_facts(settings.device), "versions": versions(),
            "complete": False, "failed": 0, "entries": [],
        }  # fmt: skip
        if settings.cuda:
            self.data["hardware"]["cudnn"] = str(torch.backends.cudnn.version())
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data, force=True)

    @contextmanager
    def entry(self, name: str) -> Iterator[dict[str, Any]]:
        """Adds what the block puts into the entry; an exception is recorded there, and the part goes on."""
        found: dict[str, Any] = {"name": name}
        began = time.perf_counter()
        try:
            yield found
        except Exception as error:  # recorded, counted in `failed` and in the exit code
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}"[:2000]
            self.data["failed"] += 1
        found["seconds"] = round(time.perf_counter() - began, 2)
        self.data["entries"].append(found)
        self.write()
        print(found, flush=True)

    def finish(self) -> int:
        """Returns the exit code of the part."""
        self.data["complete"] = True
        self.write()
        return 1 if self.data["failed"] else 0


class Loop:
    """Runs a pipeline and times its denoising loop: from the first call of the transformer to the decoder, which is a stub."""

    def __init__(self, settings: Settings, pipe: Any, steps: int, scale: float | None, batch: int = 1) -> None:
        self.settings, self.pipe, self.steps, self.scale, self.batch = settings, pipe, steps, scale, batch
        self.entries: list[Any] = [0] * batch if hasattr(pipe, "labels") else ["a red circle"] * batch
        self.began: float | None = None

    def run(self, seed: int = 0) -> tuple[float, float]:
        """Returns milliseconds of the loop: until the host was done, and until the device was."""
        self.began, marks = None, list[float]()

        def start(*_: Any) -> None:
            if self.began is None:
                self.settings.wait()
                self.began = time.perf_counter()

        def stub(decode: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> DecoderOutput:
            marks.append(time.perf_counter())
            self.settings.wait()
            marks.append(time.perf_counter())
            return DecoderOutput(torch.zeros(self.batch, 3, 8, 8, device=latents.device))

        hook = self.pipe.transformer.register_forward_pre_hook(start)
        try:
            with patched(self.pipe.vae, "decode", stub):
                call(self.pipe, self.entries, [seed + i for i in range(self.batch)], self.steps, self.scale)
        finally:
            hook.remove()
        assert self.began is not None
        return (marks[0] - self.began) * 1e3, (marks[1] - self.began) * 1e3

    def time(self, warm_up: int, rounds: int) -> dict[str, Any]:
        """Returns medians of `rounds` runs after those that warm up."""
        began = time.perf_counter()
        for _ in range(warm_up):
            self.run()
        warmed = time.perf_counter() - began
        if self.settings.cuda:
            torch.cuda.reset_peak_memory_stats()
        runs = sorted((self.run() for _ in range(self.settings.rounds(rounds))), key=lambda times: times[1])
        host, device = runs[len(runs) // 2]
        found = {"loop_ms": round(device, 3), "host_ms": round(host, 3), "warm_up_s": round(warmed, 2)}
        found |= {"fastest_ms": round(runs[0][1], 3), "slowest_ms": round(runs[-1][1], 3)}
        return found | memory(self.settings)


def memory(settings: Settings) -> dict[str, float]:
    """Returns peak and allocated GPU memory in MiB; nothing elsewhere."""
    if not settings.cuda:
        return {}
    peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return {"peak_mib": round(peak / 2**20, 1), "allocated_mib": round(now / 2**20, 1)}


def graphs_of(settings: Settings, handle: Any) -> list[dict[str, Any]]:
    """Returns each graph that a handle captured: what it runs, microseconds of a replay alone, kernels."""
    made: list[tuple[str, dict[str, int], Callable[[], Any]]] = []
    for capture in handle.executor.engine.captures:
        made += [("tables", {}, fill.replay) for fill in capture.fills.values()]
        made += [("step", dict(graph.executed), graph.replay) for graph in capture.graphs.values()]
    return [{"kind": kind, "cells": cells} | alone(settings, replay, "us") for kind, cells, replay in made]


def alone(settings: Settings, run: Callable[[], Any], key: str) -> dict[str, Any]:
    """Returns microseconds of one run on the device, under `key`, and the kernels that it launches (on a CPU, operators)."""

    def marked(mark: Callable[[], None]) -> None:
        mark()
        run()
        mark()

    run()
    settings.wait()
    began = time.perf_counter()
    for _ in range(settings.repeats):
        run()
    settings.wait()
    took = (time.perf_counter() - began) * 1e6 / settings.repeats
    return {key: round(took, 2), "kernels": launches_of(marked, settings.cuda)[0]}


def check_run(handle: Any, schedule: Schedule) -> None:
    """Raises AssertionError unless the planned cells ran, and each step that calls the network was replayed."""
    report, called = handle.report(), sum(a != "-" for a in schedule.transformers["transformer"].stack)
    assert report.executed == report.planned, f"executed {report.executed}, planned {report.planned}"
    replayed = report.counters.steps_replayed
    assert replayed == called, f"{replayed} of {called} steps were replayed"


def captures_of(handle: Any) -> dict[str, Any]:
    """Returns what a handle's captures took."""
    report = handle.report()
    return {
        "path": report.path,
        "counters": vars(report.counters),
        "executed": report.executed,
        "capture_s": round(sum(capture.seconds for capture in handle.executor.engine.captures), 3),
        "graphs_mib": round(sum(capture.bytes for capture in handle.executor.engine.captures) / 2**20, 1),
    }
