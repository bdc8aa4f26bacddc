"""Generations that hold NaN or infinity are refused, with the module and the step where these first appear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import SodaprofError
from .load import pictures_of, transformers_of
from .patch import patched


def finite_pictures(pipe: Any, sample: Callable[[], Any]) -> np.ndarray:
    """Returns the pictures of sample(), a call of the pipeline, as `pictures_of` does.

    Raises SodaprofError if they hold NaN or infinity: it samples once more to name where these first appear.
    """
    pictures = pictures_of(sample())
    if not np.isfinite(pictures).all():
        raise not_finite(pipe, sample)
    return pictures


def not_finite(pipe: Any, sample: Callable[[], Any]) -> SodaprofError:
    """Returns the error that names where NaN or infinity first appears in sample(), which repeats a generation."""
    step, found = 0, ""

    def check(place: str, values: Any) -> None:
        nonlocal found
        if not found and not all(torch.isfinite(x).all() for x in _tensors(values)):
            found = f"{place} at step {step}"

    def advance(take_step: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal step
        check("the scheduler's input (the guided output, or the latents)", (args, kwargs))
        result = take_step(*args, **kwargs)
        check("the latents that the scheduler returns", result)
        step += 1
        return result

    def output(place: str, module: Any, args: Any, result: Any) -> None:
        check(place, result)

    with ExitStack() as hooks:
        hooks.enter_context(patched(pipe.scheduler, "step", advance))
        for name, network in transformers_of(pipe).items():
            given = partial(_given, partial(check, f"what the pipeline passes to {name}"))
            hooks.callback(network.register_forward_pre_hook(given, with_kwargs=True).remove)
            for path, module in network.named_modules():
                place = f"the output of {f'{name}.{path}'.rstrip('.')}"
                hooks.callback(module.register_forward_hook(partial(output, place)).remove)
        sample()
    where = found or "the pictures alone: what decodes the latents makes them"
    return SodaprofError(
        f"NaN or infinity, first in {where}. Check the model's weights (fetch them anew), or give another dtype: --dtype float32"
    )


def _given(check: Callable[[Any], None], module: Any, args: Any, kwargs: Any) -> None:
    check((args, kwargs))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of floating point inside a value."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
