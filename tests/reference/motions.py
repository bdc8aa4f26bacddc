"""Captioned clips that the text-to-video reference model is trained on: one object that moves in one direction.

A clip is drawn and captioned from the same numbers. One combination in six of shape, colour and direction is held out: no
caption of it is ever trained on. `read` says what a clip shows without anything learned: the ground is what its border
looks like, what differs is the object, whose centre is followed and whose outline is laid over each shape's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tests.reference.drawings import DISTANCES
from tests.reference.scenes import COLOURS, SHAPES

GROUNDS = {"black": (0.05, 0.05, 0.05), "grey": (0.40, 0.40, 0.40), "brown": (0.36, 0.22, 0.10)}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}  # x to the right, y down
VERBS = ("moves", "slides", "goes")
FRAMES, SIZE = 17, 32  # frames of a clip, pixels a side
REACH = (0.38, 0.46)  # half the side of the square around the object, where the picture is 2 wide
TRAVEL = (0.75, 1.15)  # from the first to the last frame
EDGE = 2  # pixels of the border that tells the ground; an object may come near it, not fill half of it
SEEN = 0.25  # least difference of an object from the ground, in one of red, green and blue
LEAST_AREA = 9  # pixels
LEAST_TRAVEL = 0.25
LEAST_OVERLAP = 0.5  # of outlines, below which no shape is told


@dataclass(frozen=True)
class Motions:
    """A batch of clips as indices [B]."""

    shape: Tensor
    colour: Tensor
    direction: Tensor
    ground: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: Tensor | slice) -> Motions:
        return Motions(*(getattr(self, f.name)[rows] for f in fields(self)))


def held_out(motions: Motions) -> Tensor:
    """Returns, for each clip, whether its combination of shape, colour and direction is kept from training, [B] bool."""
    return (motions.shape + motions.colour + motions.direction) % 6 == 0


def sample(count: int, generator: torch.Generator, unseen: bool = False) -> Motions:
    """Returns `count` random clips, all of them held out if `unseen`, else none of them."""
    n = 12 * count if unseen else 2 * count
    sizes = (len(SHAPES), len(COLOURS), len(DIRECTIONS), len(GROUNDS))
    motions = Motions(*(torch.randint(0, size, (n,), generator=generator) for size in sizes))
    kept = motions[held_out(motions) == unseen][:count]
    return kept if len(kept) == count else sample(count, generator, unseen)


def draw(motions: Motions, generator: torch.Generator) -> Tensor:
    """Returns the clips RGB [B, 3, FRAMES, SIZE, SIZE] in −1…1; place, size, way and tint vary."""
    b = len(motions)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    reach, travel = uniform(*REACH), uniform(*TRAVEL)
    room = 1 - reach
    along = (2 * torch.rand(b, generator=generator) - 1) * (room - travel / 2).clamp_min(0)  # the middle of the way
    across = uniform(-0.6, 0.6) * room
    way = torch.tensor(list(DIRECTIONS.values())).float()[motions.direction]  # [B, 2]
    at = along[:, None] + travel[:, None] * torch.linspace(-0.5, 0.5, FRAMES)  # [B, T]
    at = at * way.sum(1, keepdim=True)
    beside = way[:, :1] != 0
    x, y = torch.where(beside, at, across[:, None]), torch.where(beside, across[:, None], at)
    alpha = outline(motions.shape, x, y, reach)[:, None]  # [B, 1, T, H, W]
    colour = torch.tensor(list(COLOURS.values()))[motions.colour] + uniform(-0.05, 0.05, 3)
    ground = torch.tensor(list(GROUNDS.values()))[motions.ground] + uniform(-0.03, 0.03, 1)
    colour, ground = (c[:, :, None, None, None] for c in (colour, ground))
    return (ground * (1 - alpha) + colour * alpha).clamp(0, 1) * 2 - 1


def outline(shape: Tensor, x: Tensor, y: Tensor, reach: Tensor) -> Tensor:
    """Returns how much of each pixel is the object's [B, T, SIZE, SIZE]: shape, reach [B], centres x, y [B, T]."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    reach = reach[:, None, None, None]
    u = (axis - x[..., None, None]) / reach
    v = (axis[:, None] - y[..., None, None]) / reach
    u, v = torch.broadcast_tensors(u, v)
    distance = torch.empty(u.shape)
    for index in shape.unique().tolist():
        rows, name = shape == index, SHAPES[index]
        # a triangle of the drawings points to the right: this one points up, and its middle is its centre
        near = (-v[rows], u[rows]) if name == "triangle" else (u[rows], v[rows])
        distance[rows] = DISTANCES[name](*near)
    return (0.5 - distance * reach * SIZE / 2).clamp(0, 1)


def caption(motions: Motions, row: int, generator: torch.Generator) -> str:
    """Returns one caption of clip `row`; the verb varies, and the ground is left unsaid half of the time."""
    chance = torch.rand(2, generator=generator).tolist()
    colour, shape = list(COLOURS)[int(motions.colour[row])], SHAPES[int(motions.shape[row])]
    text = f"a {colour} {shape} {VERBS[int(chance[0] * len(VERBS))]} {list(DIRECTIONS)[int(motions.direction[row])]}"
    ground = f" on a {list(GROUNDS)[int(motions.ground[row])]} background"
    return text + (ground if chance[1] < 0.5 else "")


def vocabulary() -> list[str]:
    """Returns every word that a caption can hold, sorted."""
    return sorted({*SHAPES, *COLOURS, *DIRECTIONS, *GROUNDS, *VERBS, "a", "on", "background"})


@dataclass(frozen=True)
class Reading:
    """What a clip shows: names, None where it cannot be told."""

    shape: str | None
    colour: str | None
    direction: str | None


def read(clip: Tensor) -> Reading:
    """Returns what a clip RGB [3, T, SIZE, SIZE] in −1…1 shows, by its pixels alone."""
    frames = (clip.float() + 1) / 2
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[EDGE:-EDGE, EDGE:-EDGE] = False
    ground = frames[..., border].median(-1).values  # [3, T]
    apart = frames - ground[..., None, None]
    size = apart.abs().amax(0)  # [T, H, W]
    solid = size > 0.75 * size.quantile(0.98)
    if size[solid].mean() < SEEN:
        return Reading(None, None, None)
    tint = apart[:, solid].mean(1)
    mask = (torch.einsum("cthw,c->thw", apart, tint) / tint.square().sum()).clamp(0, 1)  # how much of each is object
    mask = torch.where(mask > 0.2, mask, torch.zeros(()))
    area = mask.sum((1, 2))
    if (area < LEAST_AREA).any():  # some frame shows nothing
        return Reading(None, None, None)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x, y = (mask.sum(1) @ axis) / area, (mask.sum(2) @ axis) / area  # [T]
    table = torch.tensor(list(COLOURS.values()))
    colour = list(COLOURS)[int((table - frames[:, solid].mean(1)).norm(dim=1).argmin())]
    return Reading(_shape_of(mask, x, y), colour, _direction_of(x, y))


def _direction_of(x: Tensor, y: Tensor) -> str | None:
    """Returns the direction of the straight line through the centres [T], None where they hardly move or go askew."""
    time = torch.linspace(-0.5, 0.5, len(x))
    way = torch.stack([(time @ x) / time.square().sum(), (time @ y) / time.square().sum()])
    far, near = way.abs().max(), way.abs().min()
    if far < LEAST_TRAVEL or near > far / 2:
        return None
    best = torch.tensor(list(DIRECTIONS.values())).float() @ way
    return list(DIRECTIONS)[int(best.argmax())]


def _shape_of(mask: Tensor, x: Tensor, y: Tensor) -> str | None:
    """Returns the shape whose outline, at the best size and small shifts, covers the mask [T, H, W] best."""
    sizes, shifts = torch.linspace(0.3, 0.54, 13), torch.tensor([-0.12, -0.06, 0.0, 0.06, 0.12])
    best, found = LEAST_OVERLAP, None
    middle = mask[:: max(1, len(mask) // 5)]
    xs, ys = x[:: max(1, len(mask) // 5)], y[:: max(1, len(mask) // 5)]
    grid = torch.cartesian_prod(sizes, shifts)  # a triangle's centre of mass lies below its middle
    for index, name in enumerate(SHAPES):
        shape = torch.full((len(grid),), index)
        drawn = outline(shape, xs.expand(len(grid), -1), ys + grid[:, 1:], grid[:, 0])  # [sizes, T, H, W]
        overlap = torch.minimum(drawn, middle).sum((2, 3)) / torch.maximum(drawn, middle).sum((2, 3))
        if (score := overlap.mean(1).max().item()) > best:
            best, found = score, name
    return found
