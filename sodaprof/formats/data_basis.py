"""The data basis of a sampler: its steps as weights of data predictions, each formed from the latents and output of its step.

A data prediction is what the sampler's own steps would make of the latents at the end if data and noise stayed as the network
predicts them now. Second-order solvers are weights of such predictions (DPM-Solver++, arXiv 2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from ..errors import UnsupportedModelError
from .sampler import OwnUpdate

EXACT = 1e-6  # relative: coefficients come from schedulers that hold float32 numbers
FLOWS = ("FlowMatchEulerDiscreteScheduler", "RectifiedFlowScheduler")  # latents are (1 − σ) · data + σ · noise
Levels = list[tuple[float, float]]  # [T + 1] of (α, σ): latents are α · data + σ · noise


def in_data_basis(own: OwnUpdate, flow: bool) -> OwnUpdate:
    """Returns a sampler's own steps in the data basis; UnsupportedModelError if it has none (DDPM, which draws noise).

    flow: as for `noise_levels`.

    Under the basis `output` a step is x' = c0 · x + c1 · v. Of constant data and noise a prediction of noise, of data or of
    a flow's velocity stays; a v-prediction turns with the latents: (x, v) ← (c0 · x + c1 · v, c0 · v − c1 · x).
    """
    if own.basis == "data":
        return own
    rows = np.array(own.coefficients, dtype=np.float64)
    if rows.shape[1] != 2:
        raise UnsupportedModelError("the sampler weighs several outputs, so it has no data basis")
    turns = bool(np.allclose(np.hypot(*rows.T), 1, atol=EXACT)) and bool((rows[:, 1] != 0).any())
    pairs, to_end = [], np.eye(2)  # (x, v) at the end from those after a step
    for own_weight, weight in rows[::-1]:
        step = np.array([[own_weight, weight], [-weight, own_weight] if turns else [0.0, 1.0]])
        to_end = to_end @ step
        pairs.append((float(to_end[0, 0]), float(to_end[0, 1])))
    pairs.reverse()
    found = []
    for (own_weight, weight), (of_state, of_output) in zip(rows, pairs, strict=True):
        of_data = weight / of_output if of_output else 0.0
        found.append((float(own_weight - of_data * of_state), float(of_data)))
    converted = replace(own, basis="data", coefficients=tuple(found), data=tuple(pairs))
    levels = noise_levels(converted, flow)
    first_order = found if levels is None else [second_order_weights(levels, t, t + 1, [t]) for t in range(own.steps)]
    known = levels is None or max(levels)[0] < 1 + EXACT
    if any(own.noise) or not known or not np.allclose(found, first_order, atol=EXACT):
        raise UnsupportedModelError(
            "the sampler's steps are not those of constant data and noise, so it has no data basis"
        )
    return converted


def noise_levels(own: OwnUpdate, flow: bool) -> Levels | None:
    """Returns α and σ before each step and after the last, (1, 0); None if the pairs of `data` do not show them.

    own: in the data basis. flow: whether latents are (1 − σ) · data + σ · noise.
    """
    of_state, of_output = np.array(own.data, dtype=np.float64).T
    sigma = np.abs(of_output)
    if not of_state.any():
        return None
    if np.allclose(of_state, 1, atol=EXACT):
        alpha = 1 - sigma if flow else np.ones_like(sigma)
    elif np.allclose(of_state**2 + sigma**2, 1, atol=EXACT):
        alpha = of_state
    elif np.all(of_state > 0):  # (1 / α, −σ / α)
        alpha, sigma = 1 / of_state, sigma / of_state
    else:
        return None
    return [*zip(alpha.tolist(), sigma.tolist(), strict=True), (1.0, 0.0)]


def second_order_weights(levels: Levels, start: int, end: int, sources: Sequence[int]) -> np.ndarray:
    """Returns the weights [1 + sources] of DPM-Solver++ 2M from one step to another: of latents, then data predictions.

    sources: the steps of the data predictions, newest (that of `start`) first. First order without an older one and where
    log(α / σ) is infinite.
    """
    (alpha, sigma), (next_alpha, next_sigma) = levels[start], levels[end]
    ratio = next_sigma / sigma if sigma else 0.0
    weights = np.zeros(1 + len(sources))
    weights[:2] = ratio, next_alpha - alpha * ratio
    if len(sources) > 1:
        length, before = (
            _log_snr(levels[end]) - _log_snr(levels[start]),
            _log_snr(levels[start]) - _log_snr(levels[sources[1]]),
        )
        half = length / (2 * before) if math.isfinite(length) and before else 0.0
        weights[1:3] = weights[1] * (1 + half), -weights[1] * half
    return weights


def _log_snr(level: tuple[float, float]) -> float:
    alpha, sigma = level
    return math.log(alpha / sigma) if alpha > 0 and sigma > 0 else math.copysign(math.inf, alpha - sigma)
