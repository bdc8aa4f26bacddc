"""Runs at other resolutions than profiled: pruned cells recompute the same share of the tokens that the sites have then."""

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
        shape = list(given[0].shape)  # of one sample: [C, (T,) H, W], in a tensor of all samples or a list
        if shape != self.latest:
            sizes = [self._tokens(row, shape) for row in self.rows]
            for row, (tokens, raster) in zip(self.rows, sizes, strict=True):
                row.resize(tokens, raster)
            self.latest = shape
        return args, kwargs

    def _tokens(self, row: SiteRow, shape: list[int]) -> tuple[int, tuple[int, int] | None]:
        """Returns the site's tokens in latents of this shape, and their rows and columns for a local bonus."""
        if shape[1:] == self.profiled[1:]:
            return row.profiled_tokens, row.profiled_raster
        profiled = raster_of(self.profiled, self.patch, row.profiled_tokens)
        if profiled is None or len(shape) != len(self.profiled):
            if not row.prunes:
                return row.profiled_tokens, None  # their number makes no difference
            raise MismatchError(
                f"{row.key} has {row.profiled_tokens} tokens in the schedule, which are no raster of the latents "
                f"{self.profiled}: their number in latents {shape} is not known, and the schedule prunes them. Call the "
                "pipeline at the profiled size, or compile without pruning: --knob uas=none"
            )
        sides = [self.patch, self.patch] if isinstance(self.patch, int) else self.patch[-2:]
        rows, columns = (-(-size // side) for size, side in zip(shape[-2:], sides, strict=True))
        frames = profiled[0] if len(shape) == 3 else -(-shape[-3] * profiled[0] // self.profiled[-3])
        grid = row.rule.bonus_grid if row.rule is not None and row.rule.bonus else 1
        if row.prunes and (rows % grid or columns % grid):
            raise MismatchError(
                f"{row.key} has {rows} x {columns} tokens here, which blocks of {grid} x {grid} do not fill; the schedule's "
                "local bonus needs such blocks. Choose another size, or --policy soda."
            )
        return frames * rows * columns, (rows, columns)
