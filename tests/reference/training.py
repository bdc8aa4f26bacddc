"""What the trainings of the reference models share: the curve's file, the rate, averaged weights, Muon, the autoencoder."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL


def record(out: Path, stage: str, **values: object) -> None:
    """Adds values to training.STAGE.json; `curve` rows are appended."""
    path = out / f"training.{stage}.json"
    data = json.loads(path.read_text()) if path.exists() else {"curve": []}
    row = values.pop("row", None)
    if row is not None:
        data["curve"].append(row)
        print(stage, row, flush=True)
    path.write_text(json.dumps(data | values, indent=1) + "\n")


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: 200 steps of warm-up, constant, the last quarter decayed to zero by a cosine."""
    tail = max(0.0, (step / steps - 0.75) / 0.25)
    return peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * tail))


def average(ema: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Moves `ema` towards `model`: decay 0.999, faster at the start."""
    decay = min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


class Muon:
    """Orthogonal updates of matrices by momentum (Jordan et al. 2024); matrices of one shape are taken together."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        self.lr, self.momentum = lr, momentum
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.groups: list[list[torch.Tensor]] = [[p for p in matrices if tuple(p.shape) == shape] for shape in shapes]
        self.averages = [torch.zeros(len(g), *g[0].shape) for g in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, mean in zip(self.groups, self.averages, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            mean.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(mean, self.momentum))
            scale = self.lr * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_mul_(group, 1 - self.lr * 0.1)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices [n, a, b], roughly: five Newton-Schulz steps, with Jordan's coefficients."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def train_autoencoder(
    out: Path, vae: AutoencoderKL, pictures: Callable[[int, torch.Generator], torch.Tensor], steps: int, seed: int
) -> tuple[AutoencoderKL, float]:
    """Trains what of `vae` takes gradients; returns the averaged weights and the deviation of held-out latents.

    pictures: count and generator -> RGB [count, 3, H, W] in [-1, 1], on the autoencoder's device. The result is on the
    CPU; the curve goes to training.vae.json.
    """
    ema = copy.deepcopy(vae).requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-3)
    generator, start = torch.Generator().manual_seed(seed + 2), time.time()
    for step in range(steps):
        x = pictures(16, generator)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = (y - x).abs().mean() + 0.5 * edges + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.param_groups[0]["lr"] = rate(step, steps, 2e-3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average(ema, vae, step)
        if step % 250 == 0:
            psnr = -10 * math.log10(((y - x) / 2).square().mean().item())
            row = {"step": step, "loss": round(loss.item(), 4), "psnr_db": round(psnr, 2)}
            record(out, "vae", row=row | {"posterior_std": round(posterior.std.mean().item(), 3)})
    held_out = torch.Generator().manual_seed(seed + 999_979)
    with torch.no_grad():
        x = pictures(500, held_out)
        means = ema.encode(x).latent_dist.mean
        psnr = -10 * math.log10(((ema.decode(means).sample - x) / 2).square().mean().item())
    record(out, "vae", held_out_psnr_db=round(psnr, 2), seconds=round(time.time() - start))
    return ema.to("cpu", memory_format=torch.contiguous_format), means.std().item()
