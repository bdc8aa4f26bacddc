"""Whether rows of the batch change places between two steps: what the caches hold belongs to the rows that were there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import MismatchError
from ..formats.schedule import Schedule
from ..pipelines.clock import Clock, brief
from .sampler.update import called_steps

COMPARED = 1024  # about as many values of each row are compared


def carrying(schedule: Schedule) -> list[bool]:
    """Returns for each step whether it or a later one reads what a step before it left: site outputs, drifts, V."""
    reads: set[tuple[int, int]] = set()  # (source, step)
    for plan in schedule.transformers.values():
        reads |= {(w, t) for t, a in enumerate(plan.stack) if a == "S" for w in plan.stack_forecast(t).sources}
        for site, row in plan.rows.items():
            written = 0
            for step, action in enumerate(row):
                sources = plan.forecast(site, step).sources if action == "F" else (written,) if action in "RP" else ()
                reads |= {(source, step) for source in sources}
                written = step if action in "CP" else written
    called: list[int] = []  # steps of the V, oldest first
    for step, calls in enumerate(called_steps(schedule) if schedule.update is not None else ()):
        called += [step] * calls
        assert schedule.update is not None
        weights = schedule.update.coefficients[step][1:]
        reads |= {(source, step) for source, weight in zip(reversed(called), weights, strict=False) if weight}
    return [any(source < step <= reader for source, reader in reads) for step in range(schedule.steps)]


class RowOrder:
    """Compares the latents that a step gets with those that the last step returned, without a host sync (`clock.StepTaker`)."""

    def __init__(self, schedule: Schedule, clock: Clock) -> None:
        self.clock, self.carries = clock, [*carrying(schedule), False]
        self.reset()

    def reset(self) -> None:
        self.returned: Tensor | None = None
        self.version: object = None
        self.kept = torch.empty(0)
        self.moved: dict[int, Tensor] = {}  # step -> whether a row is in another's place, on the device

    def take(self, own: Callable[..., Any], scheduler: Any, step: int, *arguments: Any, **options: Any) -> Any:
        """Returns the result of own; compares before it, and keeps some of each returned row after it."""
        sample = arguments[2]
        if self.returned is not None and (sample is not self.returned or _version(sample) != self.version):
            now, before = self._values(sample), self.kept.to(sample.dtype)
            if now.shape == before.shape:
                same = (now[:, None] == before).all(2)
                self.moved[step] = (same.any(1) & ~same.diagonal()).any()
        result = own(*arguments, **options)
        latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        self.returned = None
        if torch.is_tensor(latents) and self.carries[step + 1] and len(latents) > 1:
            self.returned = latents
            self.version, self.kept = _version(latents), self._values(latents).clone()
        return result

    def _values(self, latents: Tensor) -> Tensor:
        """Returns values from all over each row; where a batch holds both branches, of its first half, which counts."""
        run = self.clock.run
        halved = run is not None and self.clock.sampler.guidance_form == "halves" and run.batches[:1] == [len(latents)]
        flat = latents.detach().reshape(len(latents), -1)[: len(latents) // 2 if halved else None]
        return flat[:, :: flat.shape[1] // COMPARED | 1]

    def moved_at(self) -> int | None:
        """Returns the first step of the run that ends before which rows changed places: the one host sync."""
        found = torch.stack([*self.moved.values()]).tolist() if self.moved else []
        return next((step for step, moved in zip(self.moved, found, strict=True) if moved), None)

    def refuse(self, step: int) -> NoReturn:
        free = tuple(float(t) for t in range(1, len(self.carries) - 1) if not self.carries[t])
        only = f" or change their order only before step {brief(free)}," if free else ""
        raise MismatchError(
            f"Rows of the batch changed places before step {step} (by a callback that resamples, say), and the schedule went on "
            "with outputs of the rows that were there before: this generation is wrong. Leave the rows in their places,"
            f"{only} or remove the schedule: sodaprof.remove(pipe)"
        )


def _version(tensor: Tensor) -> object:
    """Returns what differs after a change in place; tensors of inference mode do not count theirs."""
    return object() if tensor.is_inference() else tensor._version
