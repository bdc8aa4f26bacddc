"""The ways of sampling that an evaluation compares, and the run that samples them in turn on the same seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import SodaprofError
from ..formats.cost import CostModel
from ..formats.schedule import Schedule
from ..formats.sites import Model
from ..pipelines.load import call, pictures_of, takes_labels
from ..pipelines.patch import patched
from ..runtime.apply import Handle, apply_with
from .classifier import Classifier
from .controls import FewerSteps, fewer_steps_at, fora_at, full_steps
from .metrics import psnr_db

FEWER = "fewer steps, "  # with the solver: the name of a control that takes fewer sampler steps


@dataclass(eq=False)
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
        if batch_size < 1:
            raise SodaprofError(f"--batch-size is {batch_size}; expected at least 1.")
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
            features = features_of(self.classifier, pictures)
            contender.features.append(features.double().numpy())
            if takes_labels(self.pipe):
                with torch.no_grad():
                    guess = self.classifier.head(features).argmax(1).numpy()
                contender.hits.append(guess == np.array(entries))


def features_of(classifier: Classifier, pictures: np.ndarray) -> torch.Tensor:
    """Returns what the classifier sees in pictures [n, H, W, 3] in [0, 1]: [n, FEATURES] float32."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        return classifier.features(x)


@contextmanager
def _latents_of(pipe: Any) -> Iterator[list[tuple[np.ndarray, float]]]:
    """Yields a list that fills with (latents, time) at the VAE's door; the copy is taken after the clock is read."""
    found: list[tuple[np.ndarray, float]] = []
    vae = getattr(pipe, "vae", None)
    if vae is None:
        yield found
        return

    def tap(decode: Callable[..., Any], z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if z.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        found.append((z.detach().float().cpu().numpy(), now))
        return decode(z, *args, **kwargs)

    with patched(vae, "decode", tap):
        yield found


def nearness_db(contender: Contender, full: Contender) -> float:
    """Returns the mean PSNR of the contender's pictures to the full run's, of the same seeds."""
    return float(psnr_db(joined(contender.pictures), joined(full.pictures)).mean())


def control_candidates(
    schedules: Sequence[Schedule], model: Model, cost: CostModel, budget: float | None, wanted: Sequence[str] | bool
) -> list[Contender]:
    """Returns FORA and every fewer-step sampler at the cost of each schedule, or at the speed-up `budget`, each once.

    wanted: True for all, or the names of some ("fora", "fewer steps, DDIM").
    """
    found: dict[Any, Contender] = {}
    given = [s.transformers for s in schedules]
    for schedule in schedules:
        asked = cost.speedup(schedule) if budget is None else budget
        fora = fora_at(schedule, model, cost, asked)
        if fora is not None and fora.transformers not in given:
            found[fora.digest()] = Contender("fora", describe(fora), fora.steps, cost.speedup(fora), fora)
        count = full_steps(schedule.steps, asked)
        for control in fewer_steps_at(schedule, count):
            speedup = schedule.steps / control.steps
            detail = f"{control.steps} steps, {control.spacing}"
            found[control, count] = Contender(
                FEWER + control.solver, detail, control.steps, speedup, control=control, beside=count
            )
    return [c for c in found.values() if wanted is True or (wanted and c.name in wanted)]


def choose(
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


def describe(schedule: Schedule) -> str:
    """Returns what sets a schedule apart, in a few words."""
    pruned, skipped = schedule.counts()["P"], sum(plan.stack.count("S") for plan in schedule.transformers.values())
    parts = [f"{len(schedule.anchors())} anchors"]
    parts += [f"{pruned} pruned cells"] if pruned else []
    parts += [f"{skipped} skipped steps"] if skipped else []
    return ", ".join(parts)


def works_by(contender: Contender) -> list[str]:
    """Returns what does the work at steps that are not full: reuse, forecast, pruning, update, fewer steps."""
    if contender.schedule is None:
        return ["fewer steps"] if contender.control is not None else []
    counts, plans = contender.schedule.counts(), contender.schedule.transformers.values()
    stacks = "".join(plan.stack for plan in plans)
    found = {
        "reuse": counts["R"],
        "forecast": counts["F"] + stacks.count("S"),
        "pruning": counts["P"],
        "update": contender.schedule.update is not None,
    }
    return [what for what, used in found.items() if used]


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Returns the batches as one array."""
    return np.concatenate(parts)
