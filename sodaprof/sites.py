"""Sites: one module (self-attention, cross-attention, feed-forward, …) of one layer of a transformer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import FormatError
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

    def layout(self, site: Site) -> str:
        """How the site's output holds its tokens, a name in `models.layout.LAYOUTS`; "" is [B, N, D]."""
        layout: str = self.fingerprint.get("layouts", {}).get(f"{site.stack}.{site.module}", "")
        return layout

    def holds_text(self, site: Site) -> bool:
        """Whether the site's tokens are, or hold, those of the text: as many as the prompt is long."""
        module = site.key.split(".", 2)[2]  # with its call
        return f"{site.stack}.{module}" in self.fingerprint.get("text", ())


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
            for name, t in self.transformers.items()
        }
        return {"name": self.name, "pipeline": self.pipeline, "transformers": transformers, "shape": self.shape}


def sampler_from_json(data: Any, where: str) -> Sampler:
    """Returns the sampler written by `Sampler.to_json`; FormatError on anything else."""
    exact_keys(data, {"class", "config", "timesteps", "guidance"}, where)
    guidance = exact_keys(data["guidance"], {"form", "scale"}, f"{where}: guidance")
    if guidance["form"] not in ("halves", "passes", "none"):
        raise FormatError(f"{where}: guidance form {guidance['form']!r}; expected halves, passes or none.")
    if guidance["scale"] is not None and not is_number(guidance["scale"]):
        raise FormatError(f"{where}: guidance scale {guidance['scale']!r}; expected a number or null.")
    timesteps = data["timesteps"]
    if not isinstance(timesteps, list) or not timesteps or not all(is_number(t) for t in timesteps):
        raise FormatError(f"{where}: timesteps must be a list of at least one number.")
    if not isinstance(data["config"], dict) or not isinstance(data["class"], str):
        raise FormatError(f"{where}: class must be a string and config an object.")
    return Sampler(data["class"], data["config"], tuple(timesteps), guidance["form"], guidance["scale"])


def model_from_json(data: Any, where: str) -> Model:
    """Returns the model written by `Model.to_json`; FormatError on anything else."""
    exact_keys(data, {"name", "pipeline", "transformers", "shape"}, where)
    transformers = {}
    for name, entry in data["transformers"].items():
        at = f"{where}: transformer {name}"
        exact_keys(entry, {"class", "fingerprint", "sites"}, at)
        for s in entry["sites"]:
            exact_keys(s, set(FIELDS), f"{at}: site")
            for key, kind in FIELDS.items():
                of_type(s[key], kind, f"{at}: site: {key}")
        of_type(entry["class"], str, f"{at}: class")
        of_type(entry["fingerprint"], dict, f"{at}: fingerprint")
        sites = tuple(Site(**s) for s in entry["sites"])
        if not sites:
            raise FormatError(f"{at}: no sites. Run `sodaprof inspect` again.")
        transformers[name] = Transformer(entry["class"], entry["fingerprint"], sites)
    shape = exact_keys(data["shape"], {"latent", "tokens", "batch_profiled", "dtype"}, f"{where}: shape")
    of_type(shape["dtype"], str, f"{where}: shape: dtype")
    for key in ("name", "pipeline"):
        of_type(data[key], str, f"{where}: {key}")
    return Model(data["name"], data["pipeline"], transformers, shape)
