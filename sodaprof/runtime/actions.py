"""The one definition of every action: a hook on each site computes, reuses, forecasts or prunes as its row says.

This is the eager path and the reference that faster paths must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ..errors import MismatchError
from ..models.clock import Moment
from ..models.discover import with_rows
from ..schedule import Forecast, TokenRule
from .tokens import select

Output = Any  # a tensor [B, N, D], or the tuple of tensors that a joint attention returns


@dataclass
class _Store:
    """What one site remembers on one guidance branch."""

    cache: Output = None
    sources: dict[int, Output] = field(default_factory=dict)


class SiteRow:
    """One row of the schedule at work: what its site does at each step, and what it must remember for later."""

    def __init__(
        self,
        key: str,
        row: str,
        k: tuple[int, ...],
        forecasts: tuple[Forecast, ...],
        tokens: int,
        attends: bool,
        rule: TokenRule | None,
    ) -> None:
        self.key, self.row, self.tokens, self.attends, self.rule = key, row, tokens, attends, rule
        ks, cells = iter(k), iter(forecasts)
        self.k = [next(ks) if action == "P" else 0 for action in row]
        self.forecasts = [next(cells) if action == "F" else None for action in row]
        last_use: dict[int, int] = {}  # source step -> the last step that forecasts from it
        for step, cell in enumerate(self.forecasts):
            last_use |= dict.fromkeys(cell.sources if cell else (), step)
        self.last_use = last_use
        self.drop_at: dict[int, list[int]] = {}
        for source, step in last_use.items():
            self.drop_at.setdefault(step, []).append(source)
        # a cache is only written where R or P reads it before the next C
        self.keeps = [next((a for a in row[t + 1 :] if a in "CRP"), "C") != "C" for t in range(len(row))]
        self.stores: dict[int, _Store] = {}

    def reset(self) -> None:
        self.stores.clear()

    def run(
        self, moment: Moment, forward: Callable[..., Output], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Output:
        """Returns the module's output at this moment, computed or not as the row says."""
        step, action = moment.step, self.row[moment.step]
        store = self.stores.setdefault(moment.branch, _Store())
        if moment.branch == 0:
            moment.executed[action] += 1
        if action == "C":
            out = forward(*args, **kwargs)
            self._check_tokens(out)
            store.cache = out if self.keeps[step] else None
            if step in self.last_use:
                store.sources[step] = out
            return out
        if action == "F":
            return self._forecast(store, step)
        if store.cache is None:
            raise MismatchError(
                f"{self.key} has nothing cached at step {step} on branch {moment.branch}: the pipeline skipped earlier "
                "calls of its transformer. Profile this way of calling it, or remove() the schedule."
            )
        if action == "P" and self.k[step]:
            store.cache = self._prune(store.cache, step, forward, args, kwargs)
        return store.cache

    def _forecast(self, store: _Store, step: int) -> Output:
        cell = self.forecasts[step]
        assert cell is not None  # verify() matched F cells and forecasts
        outputs = [store.sources[source] for source in cell.sources]
        for source in self.drop_at.get(step, ()):
            del store.sources[source]
        if isinstance(outputs[0], tuple):
            return tuple(_weighted(parts, cell.weights) for parts in zip(*outputs, strict=True))
        return _weighted(outputs, cell.weights)

    def _prune(
        self,
        cache: torch.Tensor,
        step: int,
        forward: Callable[..., Output],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        assert self.rule is not None  # verify() wants a rule where there are P cells
        index = select(self.rule, cache, self.k[step])
        some_args, some_kwargs = with_rows(self.attends, args, kwargs, index)
        rows = forward(*some_args, **some_kwargs)
        # out of place: a forecast may still hold the same tensor as a source
        return cache.scatter(1, index[..., None].expand(-1, -1, cache.shape[2]), rows.to(cache.dtype))

    def _check_tokens(self, out: Output) -> None:
        tokens = (out[0] if isinstance(out, tuple) else out).shape[1]
        if tokens != self.tokens:
            raise MismatchError(
                f"{self.key} has {tokens} tokens here, {self.tokens} in the schedule: another resolution than profiled. "
                "Call the pipeline at the profiled size, or profile and compile for this one."
            )


def _weighted(outputs: Any, weights: tuple[float, ...]) -> torch.Tensor:
    total = outputs[0] * weights[0]
    for out, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + out * weight
    return total


class SiteHook(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a module: hands each call to the row of that call (a module may be called twice)."""

    def __init__(self, rows: list[SiteRow], moment: Moment) -> None:
        super().__init__()
        self.rows, self.moment = rows, moment
        self.forward_seen, self.call = -1, 0

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Output:
        self.call = self.call + 1 if self.forward_seen == self.moment.forward else 0
        self.forward_seen = self.moment.forward
        if self.call >= len(self.rows):
            raise MismatchError(
                f"{self.rows[0].key} is called {self.call + 1} times in one forward pass, the schedule has "
                f"{len(self.rows)} rows for it. Profile again: sodaprof profile MODEL -o DIR --force"
            )
        return self.rows[self.call].run(self.moment, self.fn_ref.original_forward, args, kwargs)
