"""Measures one contender in a process of its own: what it computed, how long the loop took, how near the pictures are.

Reads a task (JSON) from standard input and writes its row (JSON) to the file that the task names. `tests.studies.peers`
starts it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sodaprof.measure.evaluate import SEED
from sodaprof.measure.metrics import mean_interval, psnr_db, worst_decile
from sodaprof.pipelines.device import versions
from sodaprof.pipelines.discover import inspect_pipeline
from sodaprof.pipelines.entries import default_prompts
from sodaprof.pipelines.flops import count_flops
from sodaprof.pipelines.load import call, default_guidance, pictures_of
from tests.studies.peers_contenders import CONTENDERS, LEAST, MOST, Contender, Job, On
from tests.studies.peers_models import HOSTS

CALIBRATION = 8  # seeds 0…7, for magnitude ratios, and to count steps on while a threshold is sought
TRIES = 9  # halvings of the range of thresholds
SAME_DB = 60.0  # two runs of one seed nearer than this are the same picture


class NotRun(Exception):
    """The peer does not work here; the text says why."""


class Bench:
    """The pictures of one model with and without one cache, at batch 1: some caches decide by the batch as a whole."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task, self.host = task, HOSTS[task["model"]]
        self.plain = self.host.make()
        self.entries, self.scale = default_prompts(self.plain), default_guidance(self.plain)
        model, _, step = inspect_pipeline(self.plain, "", self.host.steps, self.scale, self.entries[0])
        ((self.name, transformer),) = model.transformers.items()
        self.sites = [site.key for site in transformer.sites]
        cost = count_flops(self.plain, model, step).transformers[self.name]
        self.fixed, self.flops = cost.step.fixed, np.array([cost.sites[key].C for key in self.sites])
        self.job = Job(task["mask"], task["schedule"], [self.entry(seed) for seed in range(CALIBRATION)])

    def entry(self, seed: int) -> int | str:
        return self.entries[seed % SEED % len(self.entries)]

    def draw(self, pipe: Any, on: On, seed: int) -> np.ndarray:
        """Returns the picture [1, H, W, 3] of a seed."""
        with on.around(), torch.no_grad():
            return pictures_of(call(pipe, [self.entry(seed)], [seed], self.host.steps, self.scale))

    def counted(self, pipe: Any, on: On, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the picture of a seed and what was computed for it: the share [T, S] of every site's rows."""
        if on.work is not None:
            return self.draw(pipe, on, seed), on.work()
        rows, now = np.zeros((self.host.steps, len(self.sites))), [-1]
        transformer = pipe.components[self.name]
        taps = [transformer.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 1))]
        for i, key in enumerate(self.sites):
            taps.append(innermost(transformer.get_submodule(key)).register_forward_pre_hook(_tally(rows, now, i)))
        try:
            picture = self.draw(pipe, on, seed)
        finally:
            for tap in taps:
                tap.remove()
        return picture, rows / np.maximum(rows.max(0), 1)

    def with_cache(self, contender: Contender, settings: dict[str, Any], helped: bool) -> tuple[Any, On]:
        """Returns a fresh pipeline of a class of its own (some caches patch the class) and the cache on it."""
        pipe = self.host.make()
        pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
        return pipe, contender.put(pipe, self.job, settings, helped)

    def computed_share(self, work: np.ndarray) -> float:
        """Returns the transformer's FLOPs under this work, of those of the full run."""
        full = self.fixed + self.flops.sum()
        return float((self.fixed + work @ self.flops).mean() / full)


def _tally(rows: np.ndarray, now: list[int], site: int) -> Callable[..., None]:
    def tap(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows[now[0], site] += args[0].numel() / args[0].shape[-1]

    return tap


def innermost(module: nn.Module) -> nn.Module:
    """Returns the first matrix of a module: it is called when the module is truly computed, whatever is hooked around it."""
    return next(part for part in module.modules() if isinstance(part, nn.Linear))


def full_steps(work: np.ndarray) -> int:
    """Returns how many steps compute everything: shares [T, S] -> a count."""
    return int((work.min(1) >= 1).sum())


def closest(
    count_at: Callable[[float], float], target: float, low: float, high: float, tries: int
) -> tuple[float, float]:
    """Returns the threshold whose count is nearest to the target, and that count; counts fall as thresholds rise.

    Halves [low, high] in logarithms. Of two equally near the one that computes more is taken.
    """
    found = []
    for threshold in (low, high):
        found.append((threshold, count_at(threshold)))
    for _ in range(tries):
        if any(count == target for _, count in found):
            break
        middle = math.sqrt(low * high)
        found.append((middle, count_at(middle)))
        low, high = (middle, high) if found[-1][1] > target else (low, middle)
    return min(found, key=lambda f: (abs(f[1] - target), -f[1]))


def why_not(bench: Bench, contender: Contender, settings: dict[str, Any], helped: bool) -> str | None:
    """Returns why a cache does not work, None where it does: it raises, skips nothing, or keeps state between pictures."""
    try:
        pipe, on = bench.with_cache(contender, settings, helped)
        first, work = bench.counted(pipe, on, 0)
        again = bench.draw(pipe, on, 0)
    except Exception as error:  # whatever the peer raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160].rstrip('.') if str(error).strip() else ''}"
    if contender.kind != "plain" and work.min() >= 1:
        return f"skipped nothing, without a word: {work.size} of {work.size} modules computed"
    if psnr_db(again, first)[0] < SAME_DB:
        return "the same seed gives another picture the second time: state is kept from the first"
    return None


def sought(bench: Bench, contender: Contender, helped: bool) -> dict[str, Any]:
    """Returns the settings with as many full steps as the mask, or as near as they get; of these the nearest pictures."""
    best: tuple[tuple[float, float], dict[str, Any]] | None = None
    plain = np.concatenate([bench.draw(bench.plain, On(), seed) for seed in range(CALIBRATION)])
    for variant in contender.variants:
        quality: dict[float, float] = {}

        def count_at(
            threshold: float, variant: dict[str, Any] = variant, quality: dict[float, float] = quality
        ) -> float:
            pipe, on = bench.with_cache(contender, variant | {"threshold": threshold}, helped)
            drawn = [bench.counted(pipe, on, seed) for seed in range(CALIBRATION)]
            quality[threshold] = float(psnr_db(np.concatenate([p for p, _ in drawn]), plain).mean())
            return float(np.mean([full_steps(work) for _, work in drawn]))

        threshold, count = closest(count_at, bench.job.computed, LEAST, MOST, TRIES)
        key = (round(abs(count - bench.job.computed)), -quality[threshold])
        if best is None or key < best[0]:
            best = key, variant | {"threshold": threshold}
    assert best is not None
    return best[1]


def loop_ms(bench: Bench, pipe: Any, on: On) -> float:
    """Returns the milliseconds from the transformer's first call to the VAE's: the denoising loop."""
    marks: list[float] = []

    def mark() -> None:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    def entered(*_: Any) -> None:
        if not marks:
            mark()

    def left(*args: Any, **kwargs: Any) -> Any:
        mark()
        return decode(*args, **kwargs)

    tap = pipe.components[bench.name].register_forward_pre_hook(entered, prepend=True)
    decode = pipe.vae.decode
    pipe.vae.decode = left
    try:
        bench.draw(pipe, on, 0)
    finally:
        tap.remove()
        del pipe.vae.decode
    return (marks[1] - marks[0]) * 1e3


def rounds_ms(sides: Sequence[Callable[[], float]], rounds: int, warm_up: int = 2) -> list[list[float]]:
    """Returns each side's times; the sides take turns, and the order turns around with every round."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(-warm_up, rounds):
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            ms = sides[i]()
            if turn >= 0:
                times[i].append(ms)
    return times


def paired(plain: Sequence[float], peer: Sequence[float]) -> float:
    """Returns the speed-up: the median over the rounds of plain over cached, which stood side by side in time.

    A machine that stops for seconds spoils the rounds that it hits, and not a median of all the others' times.
    """
    return float(np.median(np.array(plain) / np.array(peer)))


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Returns the contender's row. Raises NotRun."""
    contender, bench = CONTENDERS[task["contender"]], Bench(task)
    probe = contender.variants[-1] | ({"threshold": MOST} if contender.kind == "threshold" else {})
    documented = why_not(bench, contender, probe, False)
    helped = documented is not None
    if helped:
        if not contender.help:
            raise NotRun(documented)
        if reason := why_not(bench, contender, probe, True):
            raise NotRun(f"{documented}; with {contender.help}: {'the same' if reason == documented else reason}")
    settings = sought(bench, contender, helped) if contender.kind == "threshold" else {}
    pipe, on = bench.with_cache(contender, settings, helped)
    seeds, reference = range(SEED, SEED + task["samples"]), Path(task["reference"])
    drawn = [bench.counted(pipe, on, seed) for seed in seeds]
    pictures, work = np.concatenate([p for p, _ in drawn]), np.stack([w for _, w in drawn])
    if contender.kind == "plain":
        np.save(reference, pictures)
    quality = psnr_db(pictures, np.load(reference))
    plain, peer = rounds_ms(
        [lambda: loop_ms(bench, bench.plain, On()), lambda: loop_ms(bench, pipe, on)], task["rounds"]
    )
    return {
        "settings": settings, "documented": "works" if documented is None else documented,
        "helped": contender.help if helped else None,
        "full_steps": float(np.mean([full_steps(w) for w in work])), "computed": bench.computed_share(work.mean(0)),
        "psnr_db": mean_interval(quality) | {"worst_decile": worst_decile(quality)},
        "plain_ms": plain, "loop_ms": peer, "speedup": paired(plain, peer),
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Returns where this ran."""
    found = versions()
    with suppress(PackageNotFoundError):
        found["cache-dit"] = version("cache-dit")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "threads": torch.get_num_threads(), "versions": found}


def main() -> int:
    """Returns 0 where the row was written, also where it says that the peer did not run."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    try:
        row = {"ran": True} | measure(task)
    except NotRun as error:
        row = {"ran": False, "why": str(error)}
    Path(task["out"]).write_text(json.dumps(row | {"environment": environment()}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
