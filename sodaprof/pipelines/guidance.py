"""Guidance read off a step: the scheduler's input as a weighted sum of the network's branches."""

from __future__ import annotations

import torch

from ..errors import UnsupportedModelError

INSTEAD = "or do without whole steps and closed-loop fits (--runtime captured; compile without --fit)"
NEAR = 1e-4  # relative: the weights that are read off a step must reproduce it


def guidance_of(output: torch.Tensor, outs: list[torch.Tensor], form: str) -> tuple[list[float], bool]:
    """Returns (weights, doubled): the scheduler's input is the weighted sum of the branches, once or twice in a batch.

    outs: the network's outputs, one a call; with the form `halves` both branches in one. UnsupportedModelError if the input
    is no such sum.
    """
    parts = _parts(outs, output, form)
    if len(parts) > 2:
        raise UnsupportedModelError(
            f"a step calls the network on {len(parts)} branches; expected one or two: switch other guidance off, {INSTEAD}"
        )
    count = parts[0].shape[0]
    doubled = output.shape[0] == 2 * count
    target = output[:count].double()
    if not (doubled or output.shape[0] == count) or (doubled and not torch.equal(output[:count], output[count:])):
        raise _shapes(output, outs)
    weights = [1.0]
    if len(parts) == 2:
        one, other = (part.double() for part in parts)
        apart = one - other
        scale = float(
            (target - other).flatten() @ apart.flatten() / (apart.flatten() @ apart.flatten()).clamp_min(1e-300)
        )
        near = round(scale, 4)  # most likely the number that the user gave
        scale = near if abs(scale - near) < 1e-4 else scale
        weights = [scale, 1 - scale]
    found = sum(part.double() * weight for part, weight in zip(parts, weights, strict=True))
    if float((found - target).norm()) > NEAR * float(target.norm()):
        raise UnsupportedModelError(
            "the guided output is no weighted sum of the network's branches; expected plain guidance: switch its rescaling off, "
            f"{INSTEAD}"
        )
    return weights, doubled


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
