"""Sites: one module (self-attention, cross-attention, feed-forward, …) of one layer of a transformer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FormatError
from .files import exact_keys, is_number, of_type

FIELDS = {  # of a site in a file
    "stack": str, "layer": int, "module": str, "kind": str, "tokens": int, "width": int, "prunable": bool, "call": int,
}  # fmt: skip
KINDS = ("attn", "joint_attn", "cross_attn", "mlp", "fused")  # canonical, in the order in which blocks run them


@dataclass(frozen=True)
class Site:
    """One row of a schedule. `tokens` and `width` are N and D of the module's output [B, N, D]."""

    stack: str  # attribute of the transformer that holds the blocks, e.g. "transformer_blocks"
    layer: int
    module: str  # path inside the block, e.g. "attn1"
    kind: str  # one of KINDS
    tokens: int
    width: int
    prunable: bool  # k rows in give the same k rows of the full output
    call: int = 0  # which call of the module within one forward pass

    @property
    def key(self) -> str:
        """The site's name in files: the module path, with `#1` for a second call."""
        return f"{self.stack}.{self.layer}.{self.module}" + (f"#{self.call}" if self.call else "")

    @property
    def path(self) -> str:
        return f"{self.stack}.{self.layer}.{self.module}"


@dataclass(frozen=True)
class Transformer:
    """What the compiler knows of one transformer: its class, a readable fingerprint, its sites in execution order."""

    class_name: str
    fingerprint: dict[str, Any]
    sites: tuple[Site, ...]
    called: tuple[int, ...] = ()  # the steps at which the pipeline calls it; () stands for all of them

    def past(self, steps: int) -> list[int]:
        """How many steps of its turn went before each step, as `turn_ages` counts them."""
        return turn_ages(not self.called or step in self.called for step in range(steps))

    def layout(self, site: Site) -> str:
        """How the site's output holds its tokens, a name in `models.layout.LAYOUTS`; "" is [B, N, D]."""
        layout: str = self.fingerprint.get("layouts", {}).get(f"{site.stack}.{site.module}", "")
        return layout

    def holds_text(self, site: Site) -> bool:
        """Whether the site's tokens are, or hold, those of the text: as many as the prompt is long."""
        module = site.key.split(".", 2)[2]  # with its call
        return f"{site.stack}.{module}" in self.fingerprint.get("text", ())


def turn_ages(at_work: Iterable[bool]) -> list[int]:
    """Returns for each step how many steps went before it in the same turn, −1 where the transformer is not called.

    A turn is a run of consecutive steps at which the pipeline calls one transformer; what a cache holds is its turn's.
    """
    ages: list[int] = []
    for works in at_work:
        ages.append(-1 if not works else ages[-1] + 1 if ages else 0)
    return ages


@dataclass(frozen=True)
class Sampler:
    """The sampler a profile or schedule belongs to; `timesteps` in execution order, step 0 the noisiest."""

    class_name: str
    config: dict[str, Any]
    timesteps: tuple[float, ...]
    guidance_form: str  # "halves" (both in one batch), "passes" (one call each), "none"
    guidance_scale: float | None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def to_json(self) -> dict[str, Any]:
        guidance = {"form": self.guidance_form, "scale": self.guidance_scale}
        return {
            "class": self.class_name,
            "config": self.config,
            "timesteps": list(self.timesteps),
            "guidance": guidance,
        }


@dataclass(frozen=True)
class Model:
    """What `sodaprof inspect` finds: the transformers of a pipeline and the shape it was looked at with."""

    name: str
    pipeline: str
    transformers: dict[str, Transformer]
    shape: dict[str, Any]  # latent [C, H, W], tokens, batch_profiled, dtype

    def to_json(self) -> dict[str, Any]:
        transformers = {
            name: {"class": t.class_name, "fingerprint": t.fingerprint, "sites": [asdict(s) for s in t.sites]}
            | ({"called": list(t.called)} if t.called else {})
            for name, t in self.transformers.items()
        }
        return {"name": self.name, "pipeline": self.pipeline, "transformers": transformers, "shape": self.shape}


def sampler_from_json(data: Any, where: str) -> Sampler:
    """Returns the sampler written by `Sampler.to_json`; FormatError on anything else."""
    exact_keys(data, {"class", "config", "timesteps", "guidance"}, where)
    guidance = exact_keys(data["guidance"], {"form", "scale"}, f"{where}: guidance")
    if guidance["form"] not in ("halves", "passes", "none"):
        raise FormatError(
            f"{where}: guidance form {guidance['form']!r}; expected halves, passes or none. Write the file again."
        )
    if guidance["scale"] is not None and not is_number(guidance["scale"]):
        raise FormatError(
            f"{where}: guidance scale {guidance['scale']!r}; expected a number or null. Write the file again."
        )
    timesteps = data["timesteps"]
    if not isinstance(timesteps, list) or not timesteps or not all(is_number(t) for t in timesteps):
        raise FormatError(f"{where}: timesteps must be a list of at least one number. Write the file again.")
    if not isinstance(data["config"], dict) or not isinstance(data["class"], str):
        raise FormatError(f"{where}: class must be a string and config an object. Write the file again.")
    return Sampler(data["class"], data["config"], tuple(timesteps), guidance["form"], guidance["scale"])


def raster_of(latent: Sequence[int], patch: int | Sequence[int], tokens: int) -> tuple[int, int, int] | None:
    """Returns frames, rows and columns of a site's tokens, None where they are not those of the latents [C, (T,) H, W]."""
    sides = [patch, patch] if isinstance(patch, int) else list(patch)[-2:]
    if len(latent) < 3 or len(sides) != 2:
        return None
    rows, columns = (-(-size // side) for size, side in zip(latent[-2:], sides, strict=True))
    frames = tokens // (rows * columns)
    most = latent[-3] if len(latent) > 3 else 1
    return (frames, rows, columns) if 0 < frames <= most and frames * rows * columns == tokens else None


def shape_from_json(data: Any, where: str) -> dict[str, Any]:
    """Returns the shape that a model was looked at with, of a model or a schedule; FormatError on anything else."""
    exact_keys(data, {"latent", "tokens", "batch_profiled", "dtype"}, where)
    of_type(data["dtype"], str, f"{where}: dtype")
    numbers = [*of_type(data["latent"], list, f"{where}: latent"), data["tokens"], data["batch_profiled"]]
    if not data["latent"] or not all(type(n) is int and n > 0 for n in numbers):
        raise FormatError(f"{where}: latent, tokens and batch_profiled must be whole numbers above 0. Profile again.")
    return dict(data)


def model_from_json(data: Any, where: str) -> Model:
    """Returns the model written by `Model.to_json`; FormatError on anything else."""
    exact_keys(data, {"name", "pipeline", "transformers", "shape"}, where)
    transformers = {}
    for name, entry in data["transformers"].items():
        at = f"{where}: transformer {name}"
        turns = {"called"} & set(entry)  # only there where the transformer is not called at each step
        exact_keys(entry, {"class", "fingerprint", "sites"} | turns, at)
        for s in entry["sites"]:
            exact_keys(s, set(FIELDS), f"{at}: site")
            for key, kind in FIELDS.items():
                of_type(s[key], kind, f"{at}: site: {key}")
        of_type(entry["class"], str, f"{at}: class")
        of_type(entry["fingerprint"], dict, f"{at}: fingerprint")
        sites = tuple(Site(**s) for s in entry["sites"])
        if not sites:
            raise FormatError(f"{at}: no sites. Run `sodaprof inspect` again.")
        called = tuple(of_type(step, int, f"{at}: called") for step in entry["called"]) if turns else ()
        if turns and (not called or sorted({*called}) != list(called) or called[0] < 0):
            raise FormatError(f"{at}: called is {list(called)}; expected steps in rising order. Profile again.")
        transformers[name] = Transformer(entry["class"], entry["fingerprint"], sites, called)
    if not transformers:
        raise FormatError(f"{where}: no transformers. Run `sodaprof inspect` again.")
    shape = shape_from_json(data["shape"], f"{where}: shape")
    for key in ("name", "pipeline"):
        of_type(data[key], str, f"{where}: {key}")
    return Model(data["name"], data["pipeline"], transformers, shape)
