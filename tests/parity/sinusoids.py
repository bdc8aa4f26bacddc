"""The sinusoids of the timestep embedding as the CPU of a recording computed them.

The published networks compute them in single precision: angle = t · exp(−ln(10000) · k / 128), then cos and sin. How exp,
cos and sin round their last bit depends on the CPU (on MKL's kernels for it, whatever ATEN_CPU_CAPABILITY says). One last
bit of a frequency, 2⁻²⁴, moves an angle at t = 1000 by 6e-5, and a random network of 28 layers turns that into 3e-4 of its
output. So the recordings in `data` hold their sinusoids: `sinusoid/values` [n], `sinusoid/table` [n, 256], cosines first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from diffusers.models import embeddings
from torch import Tensor


@contextmanager
def recorded_sinusoids(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Makes diffusers' timestep embedding return the sinusoids of this recording, if it holds any.

    LookupError for a timestep that the recording does not hold.
    """
    if "sinusoid/table" not in tensors:
        yield
        return
    known, table = tensors["sinusoid/values"], tensors["sinusoid/table"]
    original = embeddings.get_timestep_embedding

    def of_recording(timesteps: Tensor, width: int, **settings: float) -> Tensor:
        published = {"flip_sin_to_cos": True, "downscale_freq_shift": 0, "scale": 1}
        if width != table.shape[1] or settings != published:
            return original(timesteps, width, **settings)
        found = timesteps.float()[:, None] == known
        if not found.any(1).all():
            raise LookupError(f"no recorded sinusoid of {timesteps.tolist()}")
        return table[found.int().argmax(1)]

    with mock.patch.object(embeddings, "get_timestep_embedding", of_recording):
        yield


def largest_move(values: Tensor) -> Tensor:
    """Returns how far two CPUs' sinusoids of values [n] may be apart, [n, 256], if each rounds as the standards allow.

    Each frequency is within one last bit of the exact one, 2⁻²³ of it, the product with t within 2⁻²⁴, cos and sin of an
    angle within one last bit of numbers up to 1, 2⁻²⁴; the two CPUs differ by twice that.
    """
    angles = values.double()[:, None] * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10_000.0)).double())
    return (2 * (angles * (2**-23 + 2**-24) + 2**-24)).repeat(1, 2)
