"""Sites, transformers, models and samplers: what a profile and a schedule belong to. model.json and sampler.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, field

from .files import Number, PositiveInt, Record, checked, decode, shown

KINDS = ("attn", "joint_attn", "cross_attn", "mlp", "fused")  # canonical, in the order in which blocks run them
MAX_STEPS = 10_000
AGAIN = "Profile again, or run `sodaprof inspect` again."
GuidanceForm = Literal["halves", "passes", "none"]  # both branches in one batch; one call each; one branch
Index = Annotated[int, Meta(ge=0, le=2**15 - 1)]  # of a layer or a step; the tables hold it in 16 bits


class SiteKey(NamedTuple):
    """The parts of a site's name in files: `transformer_blocks.3.attn1`, with `#1` for a second call of the module."""

    stack: str
    layer: int
    module: str
    call: int = 0

    @classmethod
    def parse(cls, key: str) -> SiteKey:
        """Raises ValueError if `key` is not stack.layer.module, with a number after a `#`, if there is one."""
        path, mark, call = key.partition("#")
        stack, layer, module = path.split(".", 2)
        return cls(stack, int(layer), module, int(call) if mark else 0)

    @property
    def block(self) -> str:
        """Path of the block inside the transformer."""
        return f"{self.stack}.{self.layer}"

    @property
    def path(self) -> str:
        """Path of the module inside the transformer; all calls of the module share it."""
        return f"{self.block}.{self.module}"

    @property
    def name(self) -> str:
        """The site within its block: the module, and which call of it."""
        return self.module + (f"#{self.call}" if self.call else "")

    def __str__(self) -> str:
        return f"{self.block}.{self.name}"


class Site(Record, frozen=True):
    """One row of a schedule. `tokens` and `width` are N and D of the module's output [B, N, D]."""

    stack: str  # attribute of the transformer that holds the blocks, e.g. "transformer_blocks"
    layer: Index
    module: str  # path inside the block, e.g. "attn1"
    kind: str  # one of KINDS
    tokens: PositiveInt
    width: PositiveInt
    prunable: bool  # k rows in give the same k rows of the full output
    call: Annotated[int, Meta(ge=0, le=127)] = 0  # which call of the module within one forward pass

    @property
    def place(self) -> SiteKey:
        """The parts of the site's name."""
        return SiteKey(self.stack, self.layer, self.module, self.call)

    @property
    def key(self) -> str:
        """The site's name in files."""
        return str(self.place)

    @property
    def path(self) -> str:
        """Path of the module inside the transformer."""
        return self.place.path


class Structure(Record, frozen=True):
    """The class of a transformer, and its fingerprint: what a schedule says about the modules of the network."""

    class_name: str = field(name="class")
    fingerprint: dict[str, Any]

    def tokens(self, site: str) -> int:
        """Returns N of the site: recorded by module, and by site if it has another number. KeyError if not recorded."""
        module, tokens = _module(site), self.fingerprint["tokens"]
        return tokens[site if site in tokens else module]

    def kind(self, site: str) -> str | None:
        """Returns the kind of the site, one of KINDS; None if the fingerprint does not record it."""
        kinds: dict[str, str] = self.fingerprint.get("kinds", {})
        return kinds.get(_module(site))

    def layout(self, site: str) -> str:
        """Returns how the site's output holds its tokens, a name in `pipelines.probe.LAYOUTS`; "" is [B, N, D]."""
        layouts: dict[str, str] = self.fingerprint.get("layouts", {})
        return layouts.get(_module(site), "")

    def holds_text(self, site: str) -> bool:
        """Returns whether the site's tokens are, or contain, those of the text: their number depends on the prompt."""
        key = SiteKey.parse(site)
        return f"{key.stack}.{key.name}" in self.fingerprint.get("text", ())


class Fingerprint(msgspec.Struct):
    """The entries of a fingerprint that this package reads; others are compared with the model's alone."""

    tokens: dict[str, PositiveInt]
    kinds: dict[str, str] = {}
    layouts: dict[str, str] = {}
    text: list[str] = []
    patch: PositiveInt | Annotated[list[PositiveInt], Meta(min_length=1, max_length=3)] = 1


def check_fingerprint(structure: Structure, sites: Iterable[str]) -> None:
    """Raises ValueError unless the entries of the fingerprint have their types, and it gives the tokens of all these sites."""
    try:
        msgspec.convert(structure.fingerprint, Fingerprint)
    except msgspec.ValidationError as error:
        raise ValueError(f"an entry of the fingerprint is wrong: {error}") from None
    for site in sites:
        try:
            structure.tokens(site)
        except (KeyError, ValueError):
            raise ValueError(f"the site {shown(site)} has no tokens in the fingerprint") from None


def _module(site: str) -> str:
    """Returns the name that fingerprints have for the site's module in any layer."""
    key = SiteKey.parse(site)
    return f"{key.stack}.{key.module}"


class Transformer(Structure, frozen=True, omit_defaults=True):
    """One transformer of a model: class, fingerprint, and sites in execution order."""

    sites: Annotated[tuple[Site, ...], Meta(min_length=1)]
    called: Annotated[tuple[Index, ...], Meta(min_length=1)] = ()  # the steps at which the pipeline calls it; () is all

    def __post_init__(self) -> None:
        if list(self.called) != sorted({*self.called}) or min(self.called, default=0) < 0:
            raise ValueError(f"`called` is {list(self.called)}; expected steps in rising order")

    def past(self, steps: int) -> list[int]:
        """Returns how many steps of its turn precede each step, as `turn_ages` counts them."""
        return turn_ages(not self.called or step in self.called for step in range(steps))


def turn_ages(calls: Iterable[bool]) -> list[int]:
    """Returns for each step how many steps precede it in the same turn, −1 if the transformer is not called.

    calls: whether the transformer is called at each step. A turn is a run of consecutive steps at which the pipeline calls
    one transformer; its caches are valid within the turn.
    """
    ages: list[int] = []
    for called in calls:
        ages.append(-1 if not called else ages[-1] + 1 if ages else 0)
    return ages


class Shape(Record, frozen=True):
    """The shape that a model was inspected with."""

    latent: Annotated[list[PositiveInt], Meta(min_length=1, max_length=8)]  # [C, H, W] or [C, T, H, W]
    tokens: PositiveInt
    batch_profiled: PositiveInt
    dtype: str


class Model(Record, frozen=True):
    """What `sodaprof inspect` finds: the transformers of a pipeline, and the shape that it was inspected with."""

    name: str
    pipeline: str
    transformers: Annotated[dict[str, Transformer], Meta(min_length=1)]
    shape: dict[str, Any]  # see `Shape`


def model_from_json(data: Any, where: str) -> Model:
    """Returns the model written by `Model.to_json`; FormatError for anything else."""
    model = decode(data, Model, where, AGAIN)
    decode(model.shape, Shape, f"{where}: shape", AGAIN)
    for name, transformer in model.transformers.items():
        check = partial(check_fingerprint, transformer, [site.key for site in transformer.sites])
        checked(check, f"{where}: transformers: {shown(name)}")
    return model


class Guidance(Record, frozen=True):
    """How the branches of guidance reach the network, and the guidance scale."""

    form: GuidanceForm
    scale: Number | None


class Sampler(Record, frozen=True):
    """The sampler of a profile or schedule; `timesteps` in execution order, step 0 is the noisiest."""

    class_name: str = field(name="class")
    config: dict[str, Any]
    timesteps: Annotated[tuple[Number, ...], Meta(min_length=1, max_length=MAX_STEPS)]
    guidance: Guidance

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def guidance_form(self) -> str:
        return self.guidance.form

    @property
    def guidance_scale(self) -> Number | None:
        return self.guidance.scale


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that generators do not take."""
    if seed >= 2**64:
        raise ValueError("`seed` is above 2^64 - 1")


def raster_of(latent: Sequence[int], patch: int | Sequence[int], tokens: int) -> tuple[int, int, int] | None:
    """Returns frames, rows and columns of a site's tokens; None if they are not those of the latents [C, (T,) H, W]."""
    sides = [patch, patch] if isinstance(patch, int) else list(patch)[-2:]
    if len(latent) < 3 or len(sides) != 2:
        return None
    rows, columns = (-(-size // side) for size, side in zip(latent[-2:], sides, strict=True))
    frames = tokens // (rows * columns)
    most = latent[-3] if len(latent) > 3 else 1
    return (frames, rows, columns) if 0 < frames <= most and frames * rows * columns == tokens else None
