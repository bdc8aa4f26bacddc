"""The ways of sampling that an evaluation compares, and the comparison that samples them in turn on the same seeds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import SodaprofError
from ..formats.cost import CostModel
from ..formats.schedule import Schedule
from ..formats.sites import Model
from ..pipelines.entries import takes_labels
from ..pipelines.finite import not_finite
from ..pipelines.load import call, pictures_of
from ..pipelines.patch import patched
from ..runtime.apply import Handle, apply, runtime_settings
from .classifier import Classifier
from .controls import FewerSteps, fewer_steps_at, fora_at, full_steps
from .metrics import psnr_db

FEWER = "fewer steps, "  # with the solver: the name of a control that takes fewer sampler steps


@dataclass(frozen=True, eq=False)
class Contender:
    """One way of sampling: a schedule, a control of fewer steps, or with neither the plain pipeline."""

    name: str
    detail: str
    steps: int
    speedup: float  # FLOPs
    schedule: Schedule | None = None
    control: FewerSteps | None = None
    count: int = 0  # of a control: how many full steps the cost allows; spacings of one count are alternatives

    def works_by(self) -> list[str]:
        """Returns what replaces the computation at steps that are not full: reuse, forecast, pruning, update, fewer steps."""
        if self.schedule is None:
            return ["fewer steps"] if self.control is not None else []
        counts = _counts(self.schedule)
        found = {"reuse": counts["R"], "forecast": counts["F"] + counts["S"], "pruning": counts["P"]}
        return [what for what, used in (found | {"update": self.schedule.update}).items() if used]


def contender_of(name: str, schedule: Schedule, cost: CostModel) -> Contender:
    """Returns the contender of a schedule; its detail says how many full steps, pruned cells and skipped stacks it has."""
    counts = _counts(schedule)
    others = [f"{counts[a]} {cells}" for a, cells in (("P", "pruned cells"), ("S", "skipped stacks")) if counts[a]]
    detail = ", ".join([f"{len(schedule.anchors())} full steps", *others])
    return Contender(name, detail, schedule.steps, cost.speedup(schedule), schedule)


def _counts(schedule: Schedule) -> Counter[str]:
    """Returns how many cells of each action the sites have, and how many S the stacks."""
    return schedule.counts() + Counter(S=sum(plan.stack.count("S") for plan in schedule.transformers.values()))


@dataclass(frozen=True)
class Samples:
    """What a contender sampled, and how long the denoising loop took."""

    seconds: float
    pictures: np.ndarray  # [n, H, W, 3] or [n, F, H, W, 3] in [0, 1]
    latents: Any = None  # [n, …] as the VAE decodes them; None without a VAE
    features: Any = None  # [n, FEATURES] of the model's classifier; None without one
    hits: Any = None  # [n] whether the classifier finds the label; None without a classifier or labels
    executed: dict[str, int] | None = None  # cells of the last batch, by action

    def psnr_db(self, full: Samples) -> np.ndarray:
        """Returns the PSNR of each picture to the full run's picture of the same seed, dB, [n]."""
        return psnr_db(self.pictures, full.pictures)


def _joined(batches: Sequence[Samples]) -> Samples:
    """Returns the samples of all batches of a contender."""
    parts = {name: [getattr(batch, name) for batch in batches] for name in ("pictures", "latents", "features", "hits")}
    arrays = {name: np.concatenate(found) for name, found in parts.items() if found[0] is not None}
    return Samples(sum(batch.seconds for batch in batches), **arrays, executed=batches[-1].executed)


@dataclass
class Comparison:
    """Samples batch after batch, every contender in turn on the same seeds: changes of the machine's speed affect all alike."""

    pipe: Any
    entries: Sequence[int | str]
    batch_size: int
    guidance_scale: float | None
    classifier: Classifier | None = None
    runtime: str = "hooks"
    graphs: bool = True
    on_progress: Callable[[int, int], None] = lambda done, total: None
    total: int = 0  # generations in all, of every contender: set by the caller
    done: int = 0
    _handles: dict[Contender, Handle] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SodaprofError(f"--batch-size is {self.batch_size}; expected at least 1.")

    def sample(self, contenders: Sequence[Contender], seeds: Sequence[int]) -> list[Samples]:
        """Returns the samples of each contender on the same seeds, in the order of the contenders."""
        found: list[list[Samples]] = [[] for _ in contenders]
        for start in range(0, len(seeds), self.batch_size):
            batch = list(seeds[start : start + self.batch_size])
            entries = [self.entries[(start + i) % len(self.entries)] for i in range(len(batch))]
            for contender, batches in zip(contenders, found, strict=True):
                with self._attached(contender) as handle:
                    samples = self._sample_batch(contender.steps, entries, batch)
                batches.append(samples if handle is None else replace(samples, executed=handle.report().executed))
                self.done += len(batch)
                self.on_progress(min(self.done, self.total), self.total)
        return [_joined(batches) for batches in found]

    def _attached(self, contender: Contender) -> Any:
        """Returns a context that puts the contender on the pipeline and yields its handle, None of other than schedules."""
        if contender.schedule is None:
            return nullcontext() if contender.control is None else contender.control.on(self.pipe)
        if contender not in self._handles:
            settings = runtime_settings(self.runtime, self.graphs) or self.runtime
            self._handles[contender] = apply(self.pipe, contender.schedule, runtime=settings)
        return self._handles[contender]

    def _sample_batch(self, steps: int, entries: list[int | str], seeds: list[int]) -> Samples:
        sample = partial(call, self.pipe, entries, seeds, steps, self.guidance_scale, output_type="np")
        with _decoded_latents(self.pipe) as decoded:
            began = time.perf_counter()
            out = sample()
            seconds = (decoded[0][1] if decoded else time.perf_counter()) - began
        pictures, features, hits = pictures_of(out), None, None
        if not np.isfinite(pictures).all():
            raise not_finite(self.pipe, sample)
        if self.classifier is not None:
            found = features_of(self.classifier, pictures)
            features = found.double().numpy()
            if takes_labels(self.pipe):
                with torch.no_grad():
                    hits = self.classifier.head(found).argmax(1).numpy() == np.array(entries)
        latents = np.concatenate([latents for latents, _ in decoded]) if decoded else None
        return Samples(seconds, pictures, latents, features, hits)


def features_of(classifier: Classifier, pictures: np.ndarray) -> torch.Tensor:
    """Returns the classifier's features of pictures [n, H, W, 3] in [0, 1]: [n, FEATURES] float32."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        return classifier.features(x)


@contextmanager
def _decoded_latents(pipe: Any) -> Iterator[list[tuple[np.ndarray, float]]]:
    """Yields a list that gets (latents, time) at each call of the VAE's decoder, the time read before the copy is made."""
    found: list[tuple[np.ndarray, float]] = []

    def record(decode: Callable[..., Any], z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if z.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        found.append((z.detach().float().cpu().numpy(), now))
        return decode(z, *args, **kwargs)

    vae = getattr(pipe, "vae", None)
    with nullcontext() if vae is None else patched(vae, "decode", record):
        yield found


def control_candidates(
    schedules: Sequence[Schedule], model: Model, cost: CostModel, budget: float | None, wanted: Sequence[str] | bool
) -> list[Contender]:
    """Returns FORA and every fewer-step sampler at the cost of each schedule, or at the speed-up `budget`, each once.

    wanted: True for all, or the names of some ("fora", "fewer steps, DDIM").
    """
    found: dict[Any, Contender] = {}
    given = [s.transformers for s in schedules]
    for schedule in schedules:
        speedup = cost.speedup(schedule) if budget is None else budget
        fora = fora_at(schedule, model, cost, speedup)
        if fora is not None and fora.transformers not in given:
            found[fora.digest()] = contender_of("fora", fora, cost)
        count = full_steps(schedule.steps, speedup)
        for control in fewer_steps_at(schedule, count):
            detail, ratio = f"{control.steps} steps, {control.spacing}", schedule.steps / control.steps
            found[control, count] = Contender(
                FEWER + control.solver, detail, control.steps, ratio, None, control, count
            )
    return [c for c in found.values() if wanted is True or (wanted and c.name in wanted)]


def choose_spacings(
    comparison: Comparison, full: Contender, fewer: list[Contender], seeds: Sequence[int]
) -> tuple[list[Contender], list[dict[str, Any]]]:
    """Returns for each solver and cost the spacing that is nearest to the full run on `seeds`, and all that were tried."""
    if not fewer:
        return [], []
    reference, *others = comparison.sample([full, *fewer], seeds)
    tried: list[dict[str, Any]] = []
    best: dict[tuple[str, int], tuple[float, Contender]] = {}
    for contender, samples in zip(fewer, others, strict=True):
        quality = float(samples.psnr_db(reference).mean())
        about = {"name": contender.name, "detail": contender.detail, "steps": contender.steps}
        tried.append(about | {"psnr_db": round(quality, 3)})
        key = contender.name, contender.count
        if key not in best or quality > best[key][0]:
            best[key] = quality, contender
    return [contender for _, contender in best.values()], tried
