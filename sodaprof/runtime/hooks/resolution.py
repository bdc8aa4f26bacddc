"""Another resolution than profiled: sites take the tokens of the latents at hand, pruned cells the same share of them."""

from __future__ import annotations

from typing import Any

from diffusers.hooks import ModelHook
from torch import nn

from ...errors import MismatchError
from ...formats.schedule import Plan, Schedule
from ...formats.sites import raster_of
from ...pipelines.recording import latents_of
from .sites import SiteRow


class SizeHook(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a transformer that may be called at any resolution; it runs inside the clock's."""

    def __init__(self, rows: list[SiteRow], plan: Plan, schedule: Schedule) -> None:
        super().__init__()
        self.rows = rows
        self.latest: list[int] = []
        self.profiled: list[int] = list(schedule.shape["latent"])
        self.patch: Any = plan.fingerprint.get("patch", 1)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = latents_of(module, args, kwargs)
        shape = list(given[0].shape)  # of one sample: [C, (T,) H, W], whether a tensor holds them or a list
        if shape != self.latest:
            sizes = [self._tokens(row, shape) for row in self.rows]
            for row, (tokens, raster) in zip(self.rows, sizes, strict=True):
                row.resize(tokens, raster)
            self.latest = shape
        return args, kwargs

    def _tokens(self, row: SiteRow, shape: list[int]) -> tuple[int, tuple[int, int] | None]:
        """Returns the site's tokens in latents of this shape, and their raster for a local bonus."""
        if shape[1:] == self.profiled[1:]:
            return row.profiled_tokens, row.profiled_raster
        before = raster_of(self.profiled, self.patch, row.profiled_tokens)
        now = None if before is None else _raster_at(shape, self.patch, before, self.profiled)
        if now is None:
            if not row.prunes:
                return row.profiled_tokens, None  # how many there are makes no difference to it
            raise MismatchError(
                f"{row.key} has {row.profiled_tokens} tokens in the schedule, which are no raster of the latents "
                f"{self.profiled}: their number in latents {shape} is not known, and the schedule prunes them. Call the "
                "pipeline at the profiled size, or compile without pruning: --knob uas=none"
            )
        frames, rows, columns = now
        grid = row.rule.bonus_grid if row.rule is not None and row.rule.bonus else 1
        if row.prunes and (rows % grid or columns % grid):
            raise MismatchError(
                f"{row.key} has {rows} x {columns} tokens here; the schedule's local bonus wants blocks of {grid} x {grid} that "
                "fill them. Choose another size, or --policy soda."
            )
        return frames * rows * columns, (rows, columns)


def _raster_at(
    shape: list[int], patch: Any, before: tuple[int, int, int], profiled: list[int]
) -> tuple[int, int, int] | None:
    """Returns the raster of tokens in latents of `shape`, where it was `before` in the profiled ones."""
    sides = [patch, patch] if isinstance(patch, int) else list(patch)[-2:]
    if len(shape) != len(profiled):
        return None
    rows, columns = (-(-size // side) for size, side in zip(shape[-2:], sides, strict=True))
    frames = before[0] if len(shape) == 3 else -(-shape[-3] * before[0] // profiled[-3])
    return frames, rows, columns
