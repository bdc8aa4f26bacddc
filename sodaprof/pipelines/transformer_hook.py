"""The hook on a transformer, which sets the moment of each of its calls."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Iterable
from typing import Any, NoReturn

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ..errors import UnsupportedModelError
from .clock import Clock, Moment, brief
from .recording import latents_of

TIME = ("timestep", "timesteps", "t")  # names of the argument in diffusers' transformers


def is_whole_of(time: float, found: torch.Tensor, config: dict[str, Any]) -> bool | None:
    """Whether a network receives, for a time that is no whole number, what it does for one next to it.

    found: what it receives, of any map that diffusers' pipelines have (t, t / 1000, 1 − t / 1000, 1000 − t). None if
    rounding to a half precision gives the same value, which is no reason to refuse.
    """
    if not found.is_floating_point():
        return True
    halves = [torch.tensor(time, dtype=dtype).item() for dtype in (torch.float16, torch.bfloat16)]
    whole = (math.floor(time), math.ceil(time))
    trained, value = config.get("num_train_timesteps") or 1000, found.double().item()

    def is_of(times: Iterable[float]) -> bool:
        near = 2 * torch.finfo(found.dtype).eps
        forms = [(form, size) for t in times for form in (t, trained - t) for size in (1, trained)]
        return any(abs(form / size - value) <= near * trained / size for form, size in forms)

    if not is_of(whole):
        return False
    if not is_of((time, *halves)):
        return True
    return None if set(halves) & set(whole) else False


class TransformerHook(ModelHook):  # type: ignore[misc]
    """The diffusers hook on a transformer: sets the moment before each of its calls.

    past: how many steps of its turn precede each step, −1 if another transformer is called (`sites.turn_ages`).
    on_turn is called before the first call of each turn. skipped: steps at which the network is not run; its caller gets the
    network's latest output again, which has no effect; cells: how many cells such a step has. Raises MismatchError for a
    call out of turn.
    """

    def __init__(
        self,
        clock: Clock,
        moment: Moment,
        name: str,
        past: list[int],
        on_turn: Callable[[], None] = lambda: None,
        skipped: Container[int] = (),
        cells: int = 0,
    ) -> None:
        super().__init__()
        self.clock, self.moment = clock, moment
        self.name, self.past, self.on_turn = name, past, on_turn
        self.skipped, self.cells = skipped, cells
        self.latest: dict[int, Any] = {}  # branch -> the network's output, kept if the next step is skipped

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moment = self.moment
        latents, past = latents_of(module, args, kwargs), self.past
        moment.step, moment.branch = self.clock.enter(latents, lambda step: past[step] == 0, (module, kwargs))
        if past[moment.step] < 0:
            self._refuse_turn()
        if past[moment.step] == 0 and moment.branch == 0:
            self.on_turn()
        if self.clock.checks_times and self.clock.times[moment.step] % 1:
            self._check_time(module, args, kwargs)
        moment.forward += 1
        moment.tabled = False
        return args, kwargs

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step, branch = self.moment.step, self.moment.branch
        if step not in self.skipped:
            out = self.fn_ref.original_forward(*args, **kwargs)
            if step + 1 in self.skipped:
                self.latest[branch] = out
            return out
        self.moment.executed["-"] += self.cells
        return self.latest[branch]

    def reset(self) -> None:
        self.latest.clear()

    def _check_time(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises UnsupportedModelError if the pipeline makes a whole number of a time that is none; one host sync."""
        time = self.clock.times[self.moment.step]
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        found = next((v.reshape(-1)[0] for k, v in given.arguments.items() if k in TIME and torch.is_tensor(v)), None)
        truncated = found is not None and is_whole_of(time, found, self.clock.sampler.config)
        if found is not None and truncated:
            self.clock.stop()
            raise UnsupportedModelError(
                f"The pipeline calls {self.name} with the timestep {found.item():g} for the time {time:g} of step "
                f"{self.moment.step}: it passes whole timesteps alone, and the schedule's times were fitted as fractions. Take "
                "a schedule without network times, or one whose times are whole numbers."
            )
        self.clock.times_unchecked, self.clock.checks_times = False, truncated is None

    def _refuse_turn(self) -> NoReturn:
        """Raises MismatchError: the pipeline changes transformers elsewhere than profiled."""
        step, turn = self.moment.step, tuple(t for t, past in enumerate(self.past) if past >= 0)
        self.clock.refuse(
            f"The pipeline calls {self.name} at step {step} (timestep {self.clock.times[step]:g}), at which "
            f"another transformer was called when it was profiled; {self.name} was called at steps {brief(turn)}. Set the "
            "boundary between them back (for Wan pipe.register_to_config(boundary_ratio=...)), or profile and compile anew."
        )
