"""Loads a pipeline by folder, reference name or hub id, and calls it with labels or prompts and a seed for each generation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import FormatError, SodaprofError, UnsupportedModelError
from ..formats.files import read_json

REFERENCE = Path(__file__).parents[1] / "reference"
# in an installed package, and in the repository
PROMPT_FOLDERS = [Path(__file__).parents[level] / "calibration_prompts" for level in (1, 2)]
HUB_TIMEOUT_S = 10
SMALLEST_BIN = 256  # pixels a side of the smallest square to which diffusers' pipelines round picture sizes
# a user's call of the pipeline, with prompt embeddings for example: entries, a generator for each -> the pipeline's output
OwnCall = Callable[[list[int | str], list[torch.Generator]], Any]


def reference_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in REFERENCE.glob("*/model_index.json"))


def find_model(model: str) -> Path | str:
    """Returns the folder of a pipeline, or the hub id; SodaprofError if `model` is neither.

    A folder of a pipeline holds a model_index.json, or the files that `opensora.weights` reads.
    """
    folder = Path(model)
    if (folder / "model_index.json").is_file():
        return folder
    if model in reference_models():
        return REFERENCE / model
    if folder.exists():
        from ..opensora.weights import AUTOENCODER, NETWORK, TEXT, is_published

        if is_published(folder):
            return folder
        raise SodaprofError(
            f"{model}: a folder without model_index.json, so not a diffusers pipeline. Save one there, or the folders that the "
            f"authors of Open-Sora published: {NETWORK}/, {AUTOENCODER}/ and {TEXT}/."
        )
    if model.count("/") == 1 and not model.startswith((".", "/")):
        return model
    names = ", ".join(reference_models())
    raise SodaprofError(f"{model}: no such folder and no reference model ({names}). Give a folder, a name or a hub id.")


def load_pipeline(model: str, dtype: str | None = None, device: str | None = None, scheduler: str | None = None) -> Any:
    """Returns the diffusers pipeline of `model`, on `device`, ready to call.

    dtype: float32, bfloat16 or float16; by default float32 on a CPU (half precision is slow there) and bfloat16 on a GPU.
    scheduler: a class of diffusers to sample with instead of the pipeline's own, with its settings. Settings of the process
    (verbosity, progress bars, timeouts) are as before afterwards. Raises SodaprofError if the model cannot be found or read
    (within 30 s if the hub cannot be reached), or the scheduler does not suit it.
    """
    place = find_model(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise SodaprofError(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16.")
    _check_device(device)
    with quiet_libraries():
        try:
            pipe = _read_pipeline(place, getattr(torch, dtype)).to(device)
        except Exception as error:  # the loaders below raise whatever their parts raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if isinstance(place, str):
                raise SodaprofError(
                    f"{model}: not in this machine's cache and not fetched from the hub ({reason[:120]}). "
                    "Check the name and the network, or give a local folder."
                ) from None
            reason = f"not loadable as a diffusers pipeline ({reason[:300]})"
            raise FormatError(f"{place}: {reason}. Save or fetch it anew.") from None
        pipe.set_progress_bar_config(disable=True)
        if scheduler is not None:
            set_scheduler(pipe, scheduler)
    return pipe


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Sets short hub timeouts, errors as the only messages and no progress bars while the block runs."""
    import diffusers
    import transformers
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import progress_bar_states

    timeouts = constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT
    hub_bars = dict(progress_bar_states)
    verbosity = diffusers.utils.logging.get_verbosity()
    shown = [x for x in (diffusers.utils.logging, transformers.utils.logging) if x.is_progress_bar_enabled()]
    constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = HUB_TIMEOUT_S
    diffusers.utils.logging.set_verbosity_error()
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT = timeouts
        diffusers.utils.logging.set_verbosity(verbosity)
        for logging in shown:
            logging.enable_progress_bar()
        progress_bar_states.clear()  # those of the hub last: transformers sets them, too
        progress_bar_states.update(hub_bars)


def _check_device(device: str) -> None:
    """Raises SodaprofError unless torch can use the device here."""
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # each backend raises errors of its own
        reason = str(error).strip().splitlines()[0][:120]
        raise SodaprofError(
            f"--device is {device!r}; expected one that torch can use here ({reason}). Give cpu, or leave --device out."
        ) from None


def set_scheduler(pipe: Any, name: str) -> None:
    """Replaces the pipeline's scheduler by one of this class of diffusers, with the settings that both know.

    SodaprofError if diffusers has no scheduler of this name, or one is for discrete diffusions and the other for flows.
    """
    import diffusers

    own = pipe.scheduler
    cls: Any = getattr(diffusers, name, None)
    known = isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)
    if not known:
        advice = "Give a class, such as DPMSolverMultistepScheduler"
        raise SodaprofError(f"--scheduler {name}: not a scheduler of diffusers. {advice}")
    discrete = "beta_schedule" in inspect.signature(cls).parameters, "beta_schedule" in own.config
    given, needed = ("a discrete diffusion" if found else "a flow" for found in discrete)
    if given != needed:
        raise SodaprofError(
            f"--scheduler {name} samples {given}; the pipeline has {type(own).__name__}, for {needed}. Give one for that."
        )
    pipe.scheduler = cls.from_config(own.config)


def _read_pipeline(place: Path | str, dtype: torch.dtype) -> Any:
    """Returns the pipeline in `dtype`, on the CPU; raises whatever diffusers, transformers and safetensors raise."""
    import diffusers

    if isinstance(place, Path):
        from ..opensora.pipeline import OpenSoraPipeline
        from ..opensora.weights import load_published

        if not (index := place / "model_index.json").is_file():
            return load_published(place, dtype)
        if read_json(index).get("_class_name") == OpenSoraPipeline.__name__:
            # its text encoder runs in float32 in the published script, whatever the network runs in
            parts = {"default": dtype, "text_encoder": torch.float32}
            return OpenSoraPipeline.from_pretrained(place, dtype=parts)
    return diffusers.DiffusionPipeline.from_pretrained(place, dtype=dtype)


def transformers_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Returns the pipeline's denoising networks by component name; UnsupportedModelError if there is none."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    found = {name: part for name, part in networks.items() if "transformer" in name}
    if not found:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no transformer (its networks: {', '.join(networks)}). Give one that has."
        )
    return found


def pictures_of(out: Any) -> np.ndarray:
    """Returns the pictures [n, H, W, 3] or clips [n, F, H, W, 3] in [0, 1] of a pipeline's output.

    Raises UnsupportedModelError if it holds neither.
    """
    found = next((getattr(out, name) for name in ("images", "frames") if hasattr(out, name)), None)
    if found is None:
        raise UnsupportedModelError(
            f"The pipeline returned {type(out).__name__}, which holds neither images nor frames; this release needs these."
        )
    return np.asarray(found, dtype=np.float32)


def _defaults(pipe: Any) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(pipe.__call__).parameters.items()}


def takes_labels(pipe: Any) -> bool:
    """Whether the pipeline is called with class labels rather than prompts."""
    return "class_labels" in _defaults(pipe)


def makes_video(pipe: Any) -> bool:
    """Whether the pipeline is called with a number of frames."""
    return bool({"num_frames", "video_length"} & set(_defaults(pipe)))


def default_guidance(pipe: Any) -> float | None:
    """The guidance scale that the pipeline uses when none is given."""
    scale = _defaults(pipe).get("guidance_scale")
    return None if scale is None else float(scale)


def default_steps(pipe: Any) -> int:
    """How many steps the pipeline takes if no number is given; 50 if it has no default."""
    steps = _defaults(pipe).get("num_inference_steps")
    return steps if isinstance(steps, int) else 50


def read_prompts(path: str | Path) -> list[int | str]:
    """Returns the entries of a prompt file, or of a shipped one by its name (`text-to-image`).

    One entry a line, # comments, integers are labels. Raises FormatError if there is none.
    """
    shipped = [folder / f"{path}.txt" for folder in PROMPT_FOLDERS]
    path = next((p for p in shipped if p.is_file()), Path(path))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: not readable ({error}). Give a text file with one prompt or label a line."
        ) from None
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise FormatError(f"{path}: no prompts. Write one prompt (or one integer label) a line.")
    return [int(e) if e.removeprefix("-").isdecimal() else e for e in entries]


def label_names(pipe: Any) -> dict[str, int]:
    """Returns the label of each name that the pipeline gives to its classes; {} if it gives none."""
    named = getattr(pipe, "labels", None) or {n: label for label, n in (pipe.config.get("id2label") or {}).items()}
    return {str(name): int(label) for name, label in named.items()}


def check_entries(pipe: Any, entries: Sequence[int | str], give: str | None = None) -> list[int | str]:
    """Returns prompts as they are, labels for labels and their names; SodaprofError, which advises `give`, for others."""
    if not takes_labels(pipe):
        if wrong := [e for e in entries if not isinstance(e, str)]:
            raise SodaprofError(
                f"{type(pipe).__name__} takes text prompts; found {wrong[0]!r}. Give {give or 'others: --prompts FILE'}"
            )
        return list(entries)
    names = label_names(pipe)
    found = [names.get(e.strip(), e) if isinstance(e, str) else e for e in entries]
    if unnamed := [e for e in found if isinstance(e, str)]:
        give = give or "others: --labels 0-9, or --prompts FILE"
        known = f"which is none of its names ({_few([*names])})" if names else "and it has no names for them"
        raise SodaprofError(
            f"{type(pipe).__name__} takes integer labels; found {unnamed[0][:80]!r}, {known}. Give {give}"
        )
    labels = sorted(set(names.values())) or list(range(int(pipe.transformer.config.get("num_embeds_ada_norm") or 0)))
    if unknown := [e for e in found if labels and e not in labels]:
        known = f"{labels[0]} to {labels[-1]}" if labels[-1] - labels[0] == len(labels) - 1 else _few(labels)
        raise SodaprofError(f"Found the label {unknown[0]}; this model knows {known}. Give one of these.")
    return found


def _few(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values if len(values) <= 12 else [*values[:5], "…", values[-1]]))


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises SodaprofError for seeds that torch's generators refuse."""
    if wrong := [seed for seed in (min(seeds), max(seeds)) if not 0 <= seed < 2**64]:
        raise SodaprofError(f"Found the seed {wrong[0]}; expected 0 to 2^64 - 1. Give another --seed.")


def default_entries(pipe: Any) -> tuple[list[int | str], str]:
    """Returns the entries that a model is profiled and evaluated on if none are given, and where they are from.

    SodaprofError for a model of labels without names: which of them it was trained on is unknown.
    """
    names = label_names(pipe) if takes_labels(pipe) else {}
    if takes_labels(pipe) and not names:
        raise SodaprofError(
            f"{type(pipe).__name__} takes labels and does not say which it was trained on (no id2label, no labels). Say so: "
            "--labels 0-9, or --prompts FILE with a label a line; in Python prompts=range(10)."
        )
    own_list = Path(str(pipe.config.get("_name_or_path", ""))).name
    if any((folder / f"{own_list}.txt").is_file() for folder in PROMPT_FOLDERS):
        return read_prompts(own_list), f"the shipped list {own_list}"
    if not takes_labels(pipe):
        name = "text-to-video" if makes_video(pipe) else "text-to-image"
        return read_prompts(name), f"the shipped list {name}"
    if names.get("golden retriever") == 207:
        return read_prompts("imagenet-labels"), "the shipped list imagenet-labels"
    own = sorted(set(names.values()))
    return list(own[:: math.ceil(len(own) / 100)]), "the names that the model has for its labels"


def default_prompts(pipe: Any) -> list[int | str]:
    """Returns the entries of `default_entries`."""
    return default_entries(pipe)[0]


def any_entries(pipe: Any) -> list[int | str]:
    """Returns entries that the pipeline takes, for what is the same for all of them: `default_prompts`, or label 0."""
    return [0] if takes_labels(pipe) and not label_names(pipe) else default_prompts(pipe)


def call(
    pipe: Any,
    entries: Sequence[int | str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float | None = None,
    output_type: str = "np",
    own: OwnCall | None = None,
    size: tuple[int, int] | None = None,
) -> Any:
    """Returns the pipeline's own output for one entry and one seed a generation.

    Each generation has its own generator, so that a picture does not depend on the rest of the batch.
    size: height and width in pixels, by default the pipeline's.
    own: called instead of the pipeline, with the entries and the generators; it sets everything else itself.
    Raises SodaprofError for entries, seeds, a guidance scale or a size that the pipeline cannot take.
    """
    check_seeds(seeds)
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise SodaprofError(
            f"The guidance scale is {guidance_scale}; expected a number of at least 0, as in --guidance-scale 4"
        )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if own is not None:
        return own(list(entries), generators)
    entries = check_entries(pipe, entries)
    known = _defaults(pipe)
    arguments: dict[str, Any] = {"class_labels" if takes_labels(pipe) else "prompt": entries}
    if guidance_scale is not None:
        arguments["guidance_scale"] = float(guidance_scale)
    if size is not None:
        if "height" not in known:
            raise SodaprofError(f"{type(pipe).__name__} makes pictures of one size. Leave --height and --width out.")
        arguments |= {"height": size[0], "width": size[1]}
    if "use_resolution_binning" in known and _is_below_bins(pipe):
        arguments["use_resolution_binning"] = False
    return pipe(**arguments, generator=generators, num_inference_steps=steps, output_type=output_type)


def _is_below_bins(pipe: Any) -> bool:
    """Whether the pipeline would round its own picture size up to the smallest of a list."""
    size, factor = pipe.transformer.config.get("sample_size"), getattr(pipe, "vae_scale_factor", None)
    return isinstance(size, int) and isinstance(factor, int) and size * factor < SMALLEST_BIN
