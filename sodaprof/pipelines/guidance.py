"""Guidance read off a step: the scheduler's input as a weighted sum of the network's branches."""

from __future__ import annotations

import torch

from ..errors import UnsupportedModelError

INSTEAD = "or do without whole steps and closed-loop fits (--runtime compiled; compile without --fit)"
NEAR = 1e-4  # relative: the weights that are read off a step must reproduce it


def guidance_of(
    output: torch.Tensor, outs: list[torch.Tensor], form: str, expected: float | None = None
) -> tuple[list[float], bool]:
    """Returns (weights, doubled): the scheduler's input is the weighted sum of the branches, once or twice in a batch.

    outs: the network's outputs, one a call; with the form `halves` both branches in one. expected: the guidance scale, used
    if the step agrees with it within rounding; otherwise the scale is fitted. UnsupportedModelError if the input is no such
    sum. One host sync.
    """
    parts = _parts(outs, output, form)
    if len(parts) > 2:
        raise UnsupportedModelError(
            f"a step calls the network on {len(parts)} branches; expected one or two: switch other guidance off, {INSTEAD}"
        )
    count = parts[0].shape[0]
    doubled = output.shape[0] == 2 * count
    if not (doubled or output.shape[0] == count):
        raise _shapes(output, outs)
    target, one, other = output[:count].double(), parts[0].double(), parts[-1].double()
    apart, moved = one - other, target - other
    unequal = (output[:count] != output[count:]).any().double() if doubled else moved.new_zeros(())
    products = [unequal, target.square().sum(), moved.square().sum(), (moved * apart).sum(), apart.square().sum()]
    differs, of_target, of_moved, along, of_apart = torch.stack(products).tolist()
    if differs:
        raise _shapes(output, outs)
    scale, rounding = 1.0, max(torch.finfo(tensor.dtype).eps for tensor in (output, outs[0])) / 12**0.5
    if len(parts) == 2:
        fitted = along / max(of_apart, 1e-300)
        # the difference of the branches, its multiple and the sum are each rounded, with errors of variance (eps * x)^2 / 12
        # or less; their mean over N numbers is smaller
        noise = rounding * (2 * fitted**2 * of_apart + of_target) ** 0.5
        doubt = max(1e-4, 8 * noise / max(of_apart * target.numel(), 1e-300) ** 0.5)
        likely = [] if expected is None else [expected, 1 - expected]  # 1 − expected: the other branch comes first
        likely.append(round(fitted, 4))  # most likely the number that the user gave
        scale = next((value for value in likely if abs(value - fitted) < doubt), fitted)
    left = of_moved - 2 * scale * along + scale**2 * of_apart
    allowed = max(NEAR * of_target**0.5, 1.1 * rounding * (2 * scale**2 * of_apart + of_target) ** 0.5)
    if max(left, 0.0) ** 0.5 > allowed:
        raise UnsupportedModelError(
            "the guided output is no weighted sum of the network's branches; expected plain guidance: switch its rescaling off, "
            f"{INSTEAD}"
        )
    return [scale, 1 - scale] if len(parts) == 2 else [1.0], doubled


def combined(
    outs: list[torch.Tensor], weights: list[float], doubled: bool, form: str, like: torch.Tensor
) -> torch.Tensor:
    """Returns the guided output in the scheduler's form: of the shape of `like`."""
    parts = _parts(outs, like, form)
    guided = parts[0]
    if len(parts) == 2:
        guided = parts[1] + weights[0] * (parts[0] - parts[1])
    return torch.cat([guided, guided]) if doubled else guided


def _shapes(output: torch.Tensor, outs: list[torch.Tensor]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the scheduler receives {list(output.shape)}, the network returns {list(outs[0].shape)}; expected outputs of the "
        f"latents' size, the same for both branches: call the pipeline with plain guidance, {INSTEAD}"
    )


def _parts(outs: list[torch.Tensor], output: torch.Tensor, form: str) -> list[torch.Tensor]:
    """Returns each branch's output, without the channels that the scheduler does not use (a learned variance)."""
    parts = list(outs[0].chunk(2)) if form == "halves" else outs
    if parts[0].shape[2:] != output.shape[2:] or parts[0].shape[1] < output.shape[1]:
        raise _shapes(output, outs)
    return [part[:, : output.shape[1]] for part in parts]
