"""The hook on a transformer, which sets the moment of each of its calls."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, NoReturn

from diffusers.hooks import ModelHook
from torch import nn

from .clock import Clock, Moment, brief
from .recording import latents_of


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

    def _refuse_turn(self) -> NoReturn:
        """Raises MismatchError: the pipeline changes transformers elsewhere than profiled."""
        step, turn = self.moment.step, tuple(t for t, past in enumerate(self.past) if past >= 0)
        self.clock.refuse(
            f"The pipeline calls {self.name} at step {step} (timestep {self.clock.sampler.timesteps[step]:g}), at which "
            f"another transformer was called when it was profiled; {self.name} was called at steps {brief(turn)}. Set the "
            "boundary between them back (for Wan pipe.register_to_config(boundary_ratio=...)), or profile and compile anew."
        )
