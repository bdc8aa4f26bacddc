"""`evaluate`: the same seeds with and without each schedule, beside the controls that a critic would ask for."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .controls import FewerSteps, fewer_steps_at, fora_at, full_steps
from .cost import CostModel
from .errors import MismatchError, SodaprofError
from .metrics import (
    LEAST_FOR_DISTANCE,
    frechet_distance,
    kernel_distance,
    mean_interval,
    psnr_db,
    relative_l2,
    ssim,
    worst_decile,
)
from .models.classifier import Classifier, load_classifier
from .models.discover import inspect_pipeline
from .models.flops import count_flops
from .models.load import call, default_prompts, pictures_of, takes_labels
from .profiler.run import versions
from .runtime.attach import Handle, apply_with
from .schedule import Schedule

SEED = 1_000_000  # the first evaluation seed: far from the calibration seeds, which start at 0
CALIBRATION = 8  # seeds of the profile on which the controls' spacings are chosen
SHOWN = 8  # pictures kept of every contender


@dataclass
class Contender:
    """One way of sampling: the plain pipeline, a schedule, or fewer steps."""

    name: str
    detail: str
    steps: int
    speedup: float  # FLOPs
    schedule: Schedule | None = None
    control: FewerSteps | None = None
    runtime: str = "hooks"
    handle: Handle | None = None
    beside: int = 0  # for controls: full steps at the cost of the schedules that they stand beside
    seconds: float = 0.0
    executed: dict[str, int] | None = None
    pictures: list[np.ndarray] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    hits: list[np.ndarray] = field(default_factory=list)

    def on(self, pipe: Any) -> AbstractContextManager[Handle | None]:
        if self.schedule is not None:
            self.handle = self.handle or apply_with(pipe, self.schedule, self.runtime)
            return self.handle
        return nullcontext() if self.control is None else self.control.on(pipe)

    def clear(self) -> None:
        self.seconds = 0.0
        for kept in (self.pictures, self.latents, self.features, self.hits):
            kept.clear()


def evaluate(
    pipe: Any,
    schedules: Sequence[Schedule],
    *,
    samples: int = 64,
    seed: int = SEED,
    prompts: Sequence[int | str] | None = None,
    batch_size: int = 16,
    guidance_scale: float | None = None,
    names: Sequence[str] | None = None,
    controls: bool = True,
    runtime: str = "hooks",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Returns what each schedule costs in fidelity and gains in speed over the same seeds, as plain data.

    `rows` holds the schedules and their controls, `full` the plain run, `candidates` every spacing tried for the
    fewer-step controls on calibration seeds, `pictures` the first few of each as float arrays [n, H, W, 3].
    runtime: hooks, lowered or captured, for the schedules and FORA; the pictures of the first two are the same.
    Raises MismatchError where evaluation seeds touch a schedule's calibration seeds or schedules differ in sampler.
    """
    if samples < 2:
        raise SodaprofError(f"--samples is {samples}; expected at least 2.")
    if not schedules:
        raise SodaprofError("No schedule to evaluate. Type: sodaprof eval MODEL schedule.json")
    sampler = schedules[0].sampler
    for schedule in schedules:
        if schedule.sampler.timesteps != sampler.timesteps:
            raise MismatchError("The schedules are for different timesteps; evaluate them in separate calls.")
        _keep_apart(schedule, seed, samples)
    scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    entries = default_prompts(pipe) if prompts is None else list(prompts)
    classifier = load_classifier(Path(str(pipe.config.get("_name_or_path", ""))))
    model, _, step = inspect_pipeline(pipe, "", sampler.steps, scale, entries[0])
    cost = count_flops(pipe, model, step)

    contenders = [
        Contender(names[i] if names else s.policy["name"], _describe(s), s.steps, cost.speedup(s), schedule=s)
        for i, s in enumerate(schedules)
    ]
    candidates = _control_candidates(schedules, model, cost) if controls else []
    fewer = [c for c in candidates if c.control is not None]
    fora = [c for c in candidates if c.control is None]
    full = Contender("full", f"{sampler.steps} steps", sampler.steps, 1.0)
    calibration = _calibration_seeds(schedules)
    run = Run(pipe, entries, batch_size, scale, classifier, on_progress)
    run.total = 1 + (len(calibration) * (1 + len(fewer)) if fewer else 0)
    run.total += samples * (1 + len(contenders) + len(fora) + len({(c.name, c.beside) for c in fewer}))
    run.all([full], calibration[:1])  # warms up: the first call is slow and would flatter the schedules
    full.clear()
    chosen, tried = _choose(run, full, fewer, calibration)
    contenders += fora + chosen
    for contender in contenders:
        contender.runtime = runtime
    run.all([full, *contenders], range(seed, seed + samples))
    rows = [_row(c, full) for c in contenders]
    _compare_with_fora(rows, contenders, full)
    result = {
        "format": "sodaprof.evaluation", "version": 1, "samples": samples, "seed": seed, "guidance_scale": scale,
        "device": str(getattr(pipe, "device", "cpu")), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "dtype": model.shape["dtype"], "versions": versions(),
        "runtime": runtime, "full": {"seconds_a_sample": full.seconds / samples} | _accuracy(full),
        "rows": rows, "candidates": tried,
        "notes": _notes(samples, classifier, candidates, controls)
        + (["Wall-clock of the schedules includes tracing in their first batches."] if runtime != "hooks" else []),
    }  # fmt: skip
    shown = {f"{c.name} {c.speedup:.2f}x": _cat(c.pictures)[:SHOWN] for c in contenders}
    return result | {"pictures": {"full": _cat(full.pictures)[:SHOWN]} | shown}


class Run:
    """Samples batch after batch, every contender in turn on the same seeds, so that drifts of the machine hit all."""

    def __init__(
        self,
        pipe: Any,
        entries: list[Any],
        batch_size: int,
        scale: float | None,
        classifier: Classifier | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.pipe, self.entries, self.batch_size, self.scale = pipe, entries, batch_size, scale
        self.classifier, self.on_progress = classifier, on_progress
        self.done, self.total = 0, 0

    def all(self, contenders: Sequence[Contender], seeds: Sequence[int]) -> None:
        for start in range(0, len(seeds), self.batch_size):
            batch = list(seeds[start : start + self.batch_size])
            entries = [self.entries[(start + i) % len(self.entries)] for i in range(len(batch))]
            for contender in contenders:
                with contender.on(self.pipe) as handle:
                    self._sample(contender, entries, batch)
                if handle is not None:
                    contender.executed = handle.report().executed
                self.done += len(batch)
                self.on_progress(min(self.done, self.total), self.total)

    def _sample(self, contender: Contender, entries: list[Any], seeds: list[int]) -> None:
        with _latents_of(self.pipe) as door:
            began = time.perf_counter()
            out = call(self.pipe, entries, seeds, contender.steps, self.scale, output_type="np")
            contender.seconds += (door[0][1] if door else time.perf_counter()) - began
        pictures = pictures_of(out)
        contender.pictures.append(pictures)
        contender.latents += [latent for latent, _ in door]
        if self.classifier is not None:
            x = torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1
            with torch.no_grad():
                features = self.classifier.features(x)
            contender.features.append(features.double().numpy())
            if takes_labels(self.pipe):
                with torch.no_grad():
                    guess = self.classifier.head(features).argmax(1).numpy()
                contender.hits.append(guess == np.array(entries))


@contextmanager
def _latents_of(pipe: Any) -> Iterator[list[tuple[np.ndarray, float]]]:
    """Yields a list that fills with (latents, time) at the VAE's door; the copy is taken after the clock is read."""
    found: list[tuple[np.ndarray, float]] = []
    vae = getattr(pipe, "vae", None)
    if vae is None:
        yield found
        return
    decode = vae.decode

    def tap(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if z.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        found.append((z.detach().float().cpu().numpy(), now))
        return decode(z, *args, **kwargs)

    vae.decode = tap
    try:
        yield found
    finally:
        del vae.decode


def nearness_db(contender: Contender, full: Contender) -> float:
    """Returns the mean PSNR of the contender's pictures to the full run's, of the same seeds."""
    return float(psnr_db(_cat(contender.pictures), _cat(full.pictures)).mean())


def _choose(
    run: Run, full: Contender, fewer: list[Contender], seeds: Sequence[int]
) -> tuple[list[Contender], list[dict[str, Any]]]:
    """Returns for each solver and cost the spacing that comes nearest to the full run on `seeds`, and all that were tried."""
    if not fewer:
        return [], []
    run.all([full, *fewer], seeds)
    tried: list[dict[str, Any]] = []
    best: dict[tuple[str, int], tuple[float, Contender]] = {}
    for c in fewer:
        quality = nearness_db(c, full)
        tried.append({"name": c.name, "detail": c.detail, "steps": c.steps, "psnr_db": round(quality, 3)})
        if quality > best.get((c.name, c.beside), (-1.0, c))[0]:
            best[c.name, c.beside] = quality, c
    for c in (full, *fewer):
        c.clear()
    return [c for _, c in best.values()], tried


def _control_candidates(schedules: Sequence[Schedule], model: Any, cost: CostModel) -> list[Contender]:
    """Returns FORA and every fewer-step sampler at the cost of each schedule, each once."""
    found: dict[Any, Contender] = {}
    given = [s.transformers for s in schedules]
    for schedule in schedules:
        fora = fora_at(schedule, model, cost)
        if fora is not None and fora.transformers not in given:
            found[fora.digest()] = Contender("fora", _describe(fora), fora.steps, cost.speedup(fora), fora)
        for control in fewer_steps_at(schedule, cost):
            speedup = schedule.steps / control.steps
            name = f"fewer steps, {control.solver}"
            detail = f"{control.steps} steps, {control.spacing}"
            count = full_steps(schedule, cost)
            found[control, count] = Contender(name, detail, control.steps, speedup, control=control, beside=count)
    return list(found.values())


def _row(c: Contender, full: Contender) -> dict[str, Any]:
    a, b = _cat(c.pictures), _cat(full.pictures)
    quality = psnr_db(a, b)
    row: dict[str, Any] = {
        "name": c.name,
        "detail": c.detail,
        "flops_speedup": round(c.speedup, 4),
        "wall_speedup": round(full.seconds / c.seconds, 3),
        "psnr_db": mean_interval(quality) | {"worst_decile": worst_decile(quality)},
        "ssim": float(ssim(a, b).mean()),
        "latent_l2": float(relative_l2(_cat(c.latents), _cat(full.latents)).mean()) if c.latents else None,
    } | _accuracy(c)
    if len(quality) >= LEAST_FOR_DISTANCE and c.features:
        row["frechet"] = frechet_distance(_cat(c.features), _cat(full.features))
        row["kernel"] = kernel_distance(_cat(c.features), _cat(full.features))
    if c.schedule is not None:
        row |= {"policy": c.schedule.policy["name"], "planned": dict(c.schedule.counts()), "executed": c.executed}
    return row


def _accuracy(c: Contender) -> dict[str, Any]:
    return {"accuracy": float(_cat(c.hits).mean())} if c.hits else {}


def _compare_with_fora(rows: list[dict[str, Any]], contenders: Sequence[Contender], full: Contender) -> None:
    """Adds to each schedule's row the paired PSNR difference to the FORA run of nearest cost."""
    reference = _cat(full.pictures)
    foras = [c for c in contenders if c.schedule is not None and c.schedule.policy["name"] == "fora"]
    for row, c in zip(rows, contenders, strict=True):
        if c.schedule is None or c in foras or not foras:
            continue
        fora = min(foras, key=lambda f: abs(f.speedup - c.speedup))
        difference = psnr_db(_cat(c.pictures), reference) - psnr_db(_cat(fora.pictures), reference)
        row["over_fora_db"] = mean_interval(difference) | {"fora_speedup": round(fora.speedup, 4)}


def _keep_apart(schedule: Schedule, seed: int, samples: int) -> None:
    used = schedule.profile or {"seed": 0, "samples": CALIBRATION}  # on these the controls are chosen
    if seed < used["seed"] + used["samples"] and used["seed"] < seed + samples:
        raise MismatchError(
            f"Evaluation seeds {seed}…{seed + samples - 1} touch the calibration seeds {used['seed']}…"
            f"{used['seed'] + used['samples'] - 1}. Choose others: --seed {used['seed'] + used['samples']}"
        )


def _calibration_seeds(schedules: Sequence[Schedule]) -> range:
    used = next((s.profile for s in schedules if s.profile is not None), None)
    first, count = (0, CALIBRATION) if used is None else (used["seed"], min(CALIBRATION, used["samples"]))
    return range(first, first + count)


def _describe(schedule: Schedule) -> str:
    pruned, skipped = schedule.counts()["P"], sum(plan.stack.count("S") for plan in schedule.transformers.values())
    parts = [f"{len(schedule.anchors())} anchors"]
    parts += [f"{pruned} pruned cells"] if pruned else []
    parts += [f"{skipped} skipped steps"] if skipped else []
    return ", ".join(parts)


def _notes(samples: int, classifier: Any, candidates: Any, controls: bool) -> list[str]:
    notes = []
    if classifier is None:
        notes.append("No classifier ships with this model: no class accuracy, no Fréchet and kernel distance.")
    elif samples < LEAST_FOR_DISTANCE:
        notes.append(f"Fréchet and kernel distance need {LEAST_FOR_DISTANCE} samples a side; this run has {samples}.")
    if controls and not any(c.control for c in candidates):
        notes.append("No fewer-step control: the sampler is not of the DDPM family, or the cost leaves under 2 steps.")
    return notes


def _cat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts)


def measured_record(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Returns what a schedule file keeps of an evaluation: one entry of its `measured`."""
    kept = ("device", "machine", "threads", "dtype", "samples", "seed", "guidance_scale", "versions")
    figures = ("flops_speedup", "wall_speedup", "psnr_db", "ssim", "latent_l2", "accuracy", "over_fora_db", "executed")
    return {key: result[key] for key in kept} | {key: row[key] for key in figures if key in row}
