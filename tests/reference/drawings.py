"""The drawings that the shipped reference models are trained on: ten classes of shapes, drawn from signed distances.

Everything else about a drawing varies: position, scale, rotation, colours, texture of the fill, background.
"""

from __future__ import annotations

import math

import torch

CLASSES = ("disk", "ring", "triangle", "square", "cross", "star", "crescent", "heart", "bars", "pair")
SIZE = 32  # pixels a side


def draw(labels: torch.Tensor, generator: torch.Generator, size: int = SIZE) -> torch.Tensor:
    """Returns one drawing a label: labels [B] int64 in 0…9 -> RGB [B, 3, size, size] in [-1, 1], float32."""
    b = labels.shape[0]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    scale = uniform(0.58, 0.88)[:, None, None]
    reach = 1 - 0.92 * scale[:, 0, 0]
    cx, cy = (uniform(-1, 1)[:, None, None] * reach[:, None, None] for _ in range(2))
    turn = uniform(-0.4, 0.4)[:, None, None]  # radians: enough to vary, little enough to learn
    u, v = (x - cx) / scale, (y - cy) / scale
    u, v = u * turn.cos() + v * turn.sin(), v * turn.cos() - u * turn.sin()
    distance = torch.empty(b, size, size)
    for label in labels.unique().tolist():
        rows = labels == label
        distance[rows] = DISTANCES[CLASSES[label]](u[rows], v[rows])
    alpha = (0.5 - distance * scale * size / 2).clamp(0, 1)[:, None]

    near, far, fill, fill_to = _colours(b, generator)
    lean = uniform(0, 2 * math.pi)[:, None, None]
    ramp = ((x * lean.cos() + y * lean.sin()) / 1.5 + 0.5).clamp(0, 1)[:, None]
    background = near + (far - near) * ramp
    texture = torch.randint(0, 3, (b,), generator=generator)[:, None, None]  # flat, gradient, stripes
    stripes = 0.5 + 0.5 * torch.tanh(2 * torch.sin(u * uniform(4.0, 6.0)[:, None, None] + lean))
    mix = torch.where(texture == 1, (0.5 + u / 2).clamp(0, 1), torch.where(texture == 2, stripes, torch.zeros(())))
    shape = fill + (fill_to - fill) * mix[:, None]
    return (background * (1 - alpha) + shape * alpha) * 2 - 1


def _colours(b: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Two background colours and two fill colours [b, 3, 1, 1]; the fills keep away from the background."""
    rand = lambda *shape: torch.rand(b, *shape, generator=generator)  # noqa: E731
    near = 0.08 + 0.84 * rand(3)
    far = (near + 0.5 * (rand(3) - 0.5)).clamp(0, 1)
    fill = rand(3)
    middle = (near + far) / 2
    away = fill - middle
    length = away.norm(dim=1, keepdim=True).clamp_min(1e-3)
    fill = (middle + away / length * length.clamp_min(0.55)).clamp(0, 1)
    close = (fill - middle).norm(dim=1, keepdim=True) < 0.45  # clamping may have pulled it back: take the far corner
    fill = torch.where(close, (middle < 0.5).float(), fill)
    fill_to = fill + 0.35 * (fill - middle).flip(1)
    return tuple(c.clamp(0, 1)[:, :, None, None] for c in (near, far, fill, fill_to))


def _box(u: torch.Tensor, v: torch.Tensor, a: float, b: float) -> torch.Tensor:
    return torch.maximum(u.abs() - a, v.abs() - b)


def _circle(u: torch.Tensor, v: torch.Tensor, x: float, y: float, r: float) -> torch.Tensor:
    return torch.hypot(u - x, v - y) - r


def _regular(u: torch.Tensor, v: torch.Tensor, corners: int, inner: float) -> torch.Tensor:
    """Distance to a star with that many corners; `inner` is the radius of the notches (cos(pi/n): a polygon)."""
    half = math.pi / corners
    angle = torch.remainder(torch.atan2(v, u) + half, 2 * half) - half
    r = torch.hypot(u, v)
    px, py = r * angle.cos(), r * angle.sin().abs()
    qx, qy = inner * math.cos(half), inner * math.sin(half)
    nx, ny = qy, 1 - qx  # normal of the edge from (1, 0) to (qx, qy), pointing outwards
    return ((px - 1) * nx + py * ny) / math.hypot(nx, ny)


def _heart(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    lobe = torch.hypot(u.abs() - 0.45, v + 0.3) - 0.5
    body = torch.maximum((u.abs() + v * 0.86 - 0.72) / 1.32, -v - 0.32)
    return torch.minimum(lobe, body)


DISTANCES = {
    "disk": lambda u, v: _circle(u, v, 0, 0, 0.9),
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.24,
    "triangle": lambda u, v: _regular(u, v, 3, 0.5),
    "square": lambda u, v: _box(u, v, 0.74, 0.74),
    "cross": lambda u, v: torch.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95)),
    "star": lambda u, v: _regular(u, v, 5, 0.42),
    "crescent": lambda u, v: torch.maximum(_circle(u, v, 0, 0, 0.95), -_circle(u, v, 0.5, 0, 0.72)),
    "heart": _heart,
    "bars": lambda u, v: _box(u, (v.abs() - 0.33).abs() - 0.33, 0.9, 0.17),
    "pair": lambda u, v: torch.minimum(_circle(u, v, -0.55, 0, 0.4), _circle(u, v, 0.55, 0, 0.4)),
}
