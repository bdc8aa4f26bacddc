"""Captioned pictures that the text-to-image reference model is trained on: two objects, one beside or above the other.

A scene is drawn and captioned from the same numbers. One combination in ten of shapes, colours and axis is held out: no
caption of it is ever trained on, so that a model can be asked for what it has not seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from tests.reference.drawings import DISTANCES, SIZE

SHAPES = ("disk", "ring", "triangle", "square", "cross")
COLOURS = {
    "red": (0.90, 0.08, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.10, 0.25, 1.00),
    "yellow": (1.00, 0.88, 0.05),
    "purple": (0.65, 0.10, 0.85),
    "white": (1.00, 1.00, 1.00),
}
SIZES = {"small": 0.29, "large": 0.46}  # half the side of the square around the object, where the picture is 2 wide
GROUNDS = {"black": (0.05, 0.05, 0.05), "grey": (0.45, 0.45, 0.45), "brown": (0.38, 0.24, 0.12)}
STYLES = ("background", "gradient")
RELATIONS = (  # by axis, then by which object is named first: the left or upper one, the right or lower one
    (("left of", "to the left of"), ("right of", "to the right of")),
    (("above", "over"), ("below", "under")),
)
OBJECT = tuple(tuple(values) for values in (SHAPES, COLOURS, SIZES))
# what a judge is asked about a picture: the axis, then shape, colour and size of the first and of the second object
QUESTIONS = (("beside", "above"), *OBJECT, *OBJECT)
OPENINGS = ("", "", "a picture of", "a drawing of")


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: indices [B, 2] of the two objects, the left or upper one first, and [B] of everything else."""

    shape: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    axis: torch.Tensor  # 0: beside each other, 1: above each other
    ground: torch.Tensor
    style: torch.Tensor

    def __len__(self) -> int:
        return len(self.axis)

    def __getitem__(self, rows: torch.Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True)
class Caption:
    """A caption and what it says: `owners` has, for each word, 0 (no object), 1 (the first) or 2 (the second)."""

    text: str
    owners: tuple[int, ...]
    says_size: tuple[bool, bool]
    says_ground: bool


def held_out(scenes: Scenes) -> torch.Tensor:
    """Returns, for each scene, whether its combination of shapes, colours and axis is kept from training, [B] bool."""
    (a, b), (c, d) = scenes.shape.unbind(1), scenes.colour.unbind(1)
    return (a + 2 * b + 3 * c + d + 5 * scenes.axis) % 10 == 0


def sample(count: int, generator: torch.Generator, unseen: bool = False) -> Scenes:
    """Returns `count` random scenes, all of them held out if `unseen`, else none of them; the two colours differ."""
    n = 30 * count if unseen else 2 * count

    def pick(values: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, values, (n, *shape), generator=generator)

    one = pick(len(COLOURS))
    colour = torch.stack([one, (one + 1 + pick(len(COLOURS) - 1)) % len(COLOURS)], dim=1)
    scenes = Scenes(pick(len(SHAPES), 2), colour, pick(len(SIZES), 2), pick(2), pick(len(GROUNDS)), pick(len(STYLES)))
    kept = scenes[held_out(scenes) == unseen][:count]
    return kept if len(kept) == count else sample(count, generator, unseen)


def draw(scenes: Scenes, generator: torch.Generator, size: int = SIZE) -> torch.Tensor:
    """Returns the pictures of the scenes, RGB [B, 3, size, size] in [-1, 1], float32; places and tints vary a little."""
    b = len(scenes)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    lean = uniform(0, 2 * math.pi)[:, None, None]
    ramp = (x * lean.cos() + y * lean.sin()) * 0.5 * (scenes.style == 1)[:, None, None]
    ground = torch.tensor(list(GROUNDS.values()))[scenes.ground][:, :, None, None]
    picture = ground + ramp[:, None] * (0.1 + ground)
    for i in range(2):
        scale = torch.tensor(list(SIZES.values()))[scenes.size[:, i]] * uniform(0.96, 1.04)
        along, across = (2 * i - 1) * uniform(0.46, 0.52), uniform(-0.25, 0.25)
        beside = scenes.axis == 0
        u = (x - torch.where(beside, along, across)[:, None, None]) / scale[:, None, None]
        v = (y - torch.where(beside, across, along)[:, None, None]) / scale[:, None, None]
        distance = torch.empty(b, size, size)
        for shape in scenes.shape[:, i].unique().tolist():
            rows = scenes.shape[:, i] == shape
            name = SHAPES[shape]
            # a triangle of the drawings points to the right: this one points up, and fills its square
            near = (0.25 - 1.05 * v[rows], u[rows]) if name == "triangle" else (u[rows], v[rows])
            distance[rows] = DISTANCES[name](*near)
        alpha = (0.5 - distance * scale[:, None, None] * size / 2).clamp(0, 1)[:, None]
        colour = torch.tensor(list(COLOURS.values()))[scenes.colour[:, i]] + uniform(-0.05, 0.05, 3)
        picture = picture * (1 - alpha) + colour[:, :, None, None] * alpha
    return picture.clamp(0, 1) * 2 - 1


def caption(scenes: Scenes, row: int, generator: torch.Generator) -> Caption:
    """Returns one caption of scene `row`: which object is named first, the phrasing and what is left unsaid vary."""
    chance = torch.rand(6, generator=generator).tolist()
    second_first = chance[0] < 0.5
    says_size = (chance[1] < 0.85, chance[2] < 0.85)
    says_ground = chance[3] < 0.75
    relations = RELATIONS[int(scenes.axis[row])][second_first]
    parts = [(OPENINGS[int(chance[4] * len(OPENINGS))], 0)]
    for i in (1, 0) if second_first else (0, 1):
        size = list(SIZES)[int(scenes.size[row, i])] if says_size[i] else ""
        colour, shape = list(COLOURS)[int(scenes.colour[row, i])], SHAPES[int(scenes.shape[row, i])]
        parts += [(f"a {size} {colour} {shape}", i + 1), (relations[int(chance[5] * len(relations))], 0)]
    parts.pop()  # no relation after the object named last
    if says_ground:
        parts.append((f"on a {list(GROUNDS)[int(scenes.ground[row])]} {STYLES[int(scenes.style[row])]}", 0))
    words = [(word, owner) for text, owner in parts for word in text.split()]
    return Caption(" ".join(w for w, _ in words), tuple(o for _, o in words), says_size, says_ground)


def answers(scenes: Scenes) -> torch.Tensor:
    """Returns the right answers to QUESTIONS, as indices [B, 7]."""
    objects = torch.stack([scenes.shape, scenes.colour, scenes.size], dim=2)
    return torch.cat([scenes.axis[:, None], objects.flatten(1)], dim=1)


def followed(scenes: Scenes, says_size: torch.Tensor, found: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what of its caption each picture follows, [B] bool: shape, colour, size, relation, and all of them.

    says_size: whether the caption says each object's size, [B, 2] bool. found: a judge's answers [B, 7] to QUESTIONS.
    Shape, colour and size are right where they are right of both objects, wherever these are; the relation is right
    where the axis is, and the objects look more like those asked for than they would if they had changed places.
    """
    right = answers(scenes)
    wanted, seen = right[:, 1:].unflatten(1, (2, 3)), found[:, 1:].unflatten(1, (2, 3))
    straight, swapped = wanted == seen, wanted == seen.flip(1)
    points, other = (hits[:, :, :2].sum((1, 2)) for hits in (straight, swapped))
    hits = torch.where((other > points)[:, None, None], swapped, straight)
    hits[:, :, 2] |= ~says_size
    shape, colour, size = hits.all(1).unbind(1)
    relation = (right[:, 0] == found[:, 0]) & (points > other)
    return {
        "shape": shape,
        "colour": colour,
        "size": size,
        "relation": relation,
        "all": shape & colour & size & relation,
    }


def vocabulary() -> list[str]:
    """Returns every word that a caption can hold, sorted."""
    phrases = [*SHAPES, *COLOURS, *SIZES, *GROUNDS, *STYLES, *OPENINGS, "a on"]
    phrases += [phrase for axis in RELATIONS for order in axis for phrase in order]
    return sorted({word for phrase in phrases for word in phrase.split()})
