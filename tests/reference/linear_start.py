"""Starts for small autoencoders, to train on from: linear maps that average pixels, or frames, and repeat them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL

from sodaprof.opensora.autoencoder import CausalConv3d, ResBlock, TemporalVAE


@torch.no_grad()
def start_linear(vae: AutoencoderKL, level: float = 3.0) -> None:
    """Makes the autoencoder average blocks of pixels and repeat them: many dB better than a random start, and trains on.

    Colours ride in channels 0-2 and negated in 3-5 (silu(x) - silu(-x) = x); from the first change of width on, the
    other channels hold +-level, so that the scale of the last norm hardly depends on the picture. Residual branches start
    at zero, posteriors narrow: wide ones drown the signal for long. For norms of one group, 7 or more channels a level,
    and another width at the last level than at the first.
    """
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            torch._foreach_zero_(list(module.conv2.parameters()))
        if type(module).__name__ == "Attention":
            torch._foreach_zero_(list(module.to_out[0].parameters()))
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1
    quarter = torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])
    for half, sampler, taps in ((vae.encoder, "downsamplers", quarter), (vae.decoder, "upsamplers", centre)):
        _carry(half.conv_in, centre, pairs_in=False)
        holds = False
        blocks = half.down_blocks if half is vae.encoder else half.up_blocks
        for block in blocks:
            for resnet in block.resnets:
                if resnet.conv_shortcut is not None:
                    _carry(resnet.conv_shortcut, torch.ones(1, 1))
                    _hold(resnet.conv_shortcut, level)
                    holds = True
            for part in getattr(block, sampler) or ():
                _carry(part.conv, taps, keep=holds)
        width = half.conv_norm_out.num_channels
        half.conv_norm_out.weight.fill_(level * math.sqrt((width - 6) / width))
        half.conv_out.weight[:3] = 0
        half.conv_out.weight[3:] *= 0.1
        half.conv_out.bias.zero_()
        for c in range(3):
            half.conv_out.weight[c, c], half.conv_out.weight[c, 3 + c] = centre, -centre
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch._foreach_zero_(list(conv.parameters()))
        for c in range(vae.config.latent_channels):
            conv.weight[c, c] = 1
    vae.quant_conv.bias[vae.config.latent_channels :] = -6


def _carry(conv: torch.nn.Conv2d, taps: torch.Tensor, pairs_in: bool = True, keep: bool = False) -> None:
    """Channels 0-2 -> 0-2 through `taps`, and their negatives to 3-5; the rest is kept as it is, or a tenth of random."""
    assert conv.bias is not None
    conv.weight[:6] = 0
    conv.weight[6:] *= 0 if keep else 0.1
    conv.bias.zero_()
    for c in range(3):
        conv.weight[c, c], conv.weight[3 + c, 3 + c if pairs_in else c] = taps, taps if pairs_in else -taps
    for c in range(6, len(conv.bias) if keep else 0):
        conv.weight[c, c] = taps


def _hold(conv: torch.nn.Conv2d, level: float) -> None:
    """Sets the channels from 6 on to +level and -level in turn."""
    assert conv.bias is not None
    conv.weight[6:] = 0
    conv.bias[6:] = level * (1 - 2 * (torch.arange(len(conv.bias) - 6) % 2))


@torch.no_grad()
def start_linear_in_time(half: TemporalVAE, level: float = 3.0) -> None:
    """Makes a temporal half average frames and repeat them, in the way of `start_linear`; for latents of unit variance.

    Latent channel c rides in channel c and negated in C + c, the channels from 2C on hold +-level. For norms of one group,
    one width of more than 2C channels at all levels.
    """
    for module in half.modules():
        if isinstance(module, ResBlock):
            module.conv2.conv.weight.zero_()
    first, last = half.encoder.conv_in.conv, half.encoder.conv2.conv
    channels, width = first.in_channels, first.out_channels
    _place(first, [(c + sign * channels, c, 1 - 2 * sign) for c in range(channels) for sign in (0, 1)], (0, 0, 1))
    kept = [(c, c, 1.0) for c in range(2 * channels)]
    holds = False
    for conv in half.encoder.conv_blocks:
        if isinstance(conv, CausalConv3d):  # of the three frames that it sees, the last two are the pair it stands for
            _place(conv.conv, kept if not holds else [(c, c, 1.0) for c in range(width)], (0, 0.5, 0.5))
            if not holds:
                _hold_in_time(conv.conv, 2 * channels, level)
            holds = True
    _place(
        half.decoder.conv1.conv, [(c + s * channels, c, 1 - 2 * s) for c in range(channels) for s in (0, 1)], (0, 0, 1)
    )
    _hold_in_time(half.decoder.conv1.conv, 2 * channels, level)
    for conv in half.decoder.conv_blocks:
        if isinstance(conv, CausalConv3d):  # its channels 2c and 2c + 1 are the two frames of channel c
            _place(conv.conv, [(2 * c + s, c, 1.0) for c in range(width) for s in (0, 1)], (0, 0, 1))
    for part, out in ((half.encoder, last), (half.decoder, half.decoder.conv_out.conv)):
        share = 2 * channels / width
        part.norm1.weight.fill_(math.sqrt(share + (1 - share) * level**2))
        taps = (1.0,) if out.kernel_size[0] == 1 else (0, 0, 1)
        _place(out, [(c, c + s * channels, 1 - 2 * s) for c in range(channels) for s in (0, 1)], taps)
    for conv in (half.quant_conv.conv, half.post_quant_conv.conv):
        _place(conv, [(c, c, 1.0) for c in range(conv.out_channels)], (1.0,))
    assert last.bias is not None
    last.bias[channels:] = -6


def _place(conv: torch.nn.Conv3d, pairs: Sequence[tuple[int, int, float]], taps: Sequence[float]) -> None:
    """Makes the convolution zero but for (out, in, factor) in the middle of H and W, `taps` over the frames it sees."""
    conv.weight.zero_()
    if conv.bias is not None:
        conv.bias.zero_()
    middle = conv.kernel_size[1] // 2
    for out, channel, factor in pairs:
        conv.weight[out, channel, :, middle, middle] = factor * torch.tensor(taps, dtype=torch.float32)


def _hold_in_time(conv: torch.nn.Conv3d, first: int, level: float) -> None:
    """Sets the channels from `first` on to +level and -level in turn."""
    assert conv.bias is not None
    conv.bias[first:] = level * (1 - 2 * (torch.arange(len(conv.bias) - first) % 2))
