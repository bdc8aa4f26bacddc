"""Makes tests/data from the recordings as they were given: fewer steps, blocks and coordinates, every kept number unchanged.

    python -m tests.parity.shrink_recordings ORIGINALS tests/data

What is kept:

- DiT, PixArt (ToCa, DuCa): all weights; the calls of the steps in CALLS. The first step after a gap computes everything,
  so what is left out has no effect on what follows. Of x, one guidance half (the other is equal); of each output one
  coordinate of every token and sample (`coordinates` [n, axes]); the token sets of the kept steps; the types of all steps.
- Open-Sora (ToCa): the first BLOCKS of 28 pairs of blocks, entered at the blocks. The authors' numbers are weights, inputs,
  modulation, text, step types and token sets. The authors recorded no output between blocks: `blocks_out` is computed here,
  in the run of all 28 pairs that repeats every recorded token set, and every recorded output to single precision.
- Open-Sora's scheduler and network: the trajectories at STATES of 30 steps, every TOKENS-th token of the blocks' outputs.
- Open-Sora's autoencoder: decoded videos at PIXELS; of 34 frames (two whole chunks) the decoder alone.

`sinusoid/` and Open-Sora's positions without a text mask are added (see sinusoids.py): this CPU's, after a check that it
computes what the authors' CPU computed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sodaprof.opensora import layers
from tests.parity import parity

Tensors = dict[str, Tensor]
Change = Callable[[Path, Tensors, dict[str, Any]], None]

CALLS = {
    "dit_toca_ddim50": (*range(6), *range(13, 23), *range(45, 50)),
    "dit_duca_ddim50": (*range(6), *range(13, 23), *range(45, 50)),
    "pixart_toca_20": (*range(7), 9, 10, 11, 18, 19),
    "opensora_toca_30": (*range(10), *range(24, 30)),
}
BLOCKS = 4
STATES = [0, 1, 2, 9, 19, 29]
TOKENS = 5
PIXELS = (..., slice(None, None, 3), slice(None, None, 5))  # phases of all kinds: 3 and 5 divide no power of two


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["meta"])  # noqa: SIM118


def add_sinusoids(tensors: Tensors, values: Tensor) -> None:
    tensors["sinusoid/values"] = values.float().unique()
    tensors["sinusoid/table"] = layers.ScalarEmbed(1).sinusoid(tensors["sinusoid/values"])


def check_this_cpu(originals: Path) -> None:
    """Raises SystemExit unless this CPU gives the recorded outputs of Open-Sora's timestep embedding and its positions."""
    tensors, meta = read(originals / "opensora_rflow.safetensors")
    embed = layers.ScalarEmbed(len(tensors["weights/t_embedder.mlp.2.bias"]))
    prefix = "weights/t_embedder."
    embed.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    with torch.no_grad():
        found = embed.double()(tensors["in/stdit/timestep"].double())
    for ours, wanted in (
        (found, tensors["out/stdit/t_embedder"]),
        (positions(tensors, meta, (3, 4)), tensors["out/stdit/pos_embed"]),
    ):
        if (ours - wanted).abs().max() > 1e-13:
            raise SystemExit("This CPU rounds exp, pow, cos or sin otherwise than that of the recordings.")


def positions(tensors: Tensors, meta: dict[str, Any], grid: tuple[int, int]) -> Tensor:
    """Returns Open-Sora's position vectors [1, S, D] of the recorded size on a grid of tokens, as this CPU computes them."""
    unit = (tensors["in/stdit/height"][0].item() * tensors["in/stdit/width"][0].item()) ** 0.5
    config = meta["stdit"]
    unit /= config["input_sq_size"]
    return layers.positions(grid, config["hidden_size"], unit, torch.float64, torch.device("cpu"))


def keep_calls(name: str, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Drops what belongs to other calls, and what no check reads."""
    steps, total = CALLS[name], int(meta["args"]["steps"])
    counters = {total - 1 - step if name.startswith("dit") else step for step in steps}
    for key in list(tensors):
        kind, *rest = key.split("/")
        if (
            kind in ("model", "final", "noise", "cap" if "opensora" in name else "")
            or (kind == "call" and int(rest[0]) not in steps)
            or (kind == "selected" and int(rest[0]) not in counters)
        ):
            del tensors[key]
    if "calls" in meta:
        meta["calls"] = {step: call for step, call in meta["calls"].items() if int(step) in steps}


def first_half(tensors: Tensors, key: str) -> None:
    one, other = tensors[key].chunk(2)
    assert torch.equal(one, other), key
    tensors[key] = one.clone()


def one_place_a_token(count: int, samples: int, places: int) -> Tensor:
    """Returns [samples, count]: which of a token's numbers is kept; all places come up in turn."""
    return (13 * torch.arange(count) + 29 * torch.arange(samples)[:, None]) % places


def pictures(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Of DiT and PixArt."""
    keep_calls(path.stem, tensors, meta)
    samples, channels, side, _ = tensors["call/000/out"].shape
    patch = meta["cfg"]["patch"]
    across = side // patch
    place = one_place_a_token(across**2, samples, channels * patch**2)
    token, sample = torch.arange(across**2).expand_as(place), torch.arange(samples)[:, None].expand_as(place)
    row, column = token // across * patch + place % patch**2 // patch, token % across * patch + place % patch
    coordinates = torch.stack([sample, place // patch**2, row, column], -1).flatten(0, 1)
    tensors["coordinates"] = coordinates.short()
    for step in CALLS[path.stem]:
        first_half(tensors, f"call/{step:03d}/x")
        tensors[f"call/{step:03d}/out"] = tensors[f"call/{step:03d}/out"][tuple(coordinates.T)].clone()
    add_sinusoids(tensors, torch.cat([tensors[f"call/{step:03d}/t"] for step in CALLS[path.stem]]))


def duca(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """As `pictures`; the weights are those of another recording."""
    meta["weights_in"] = "dit_toca_ddim50"
    other, _ = read(path.with_name(f"{meta['weights_in']}.safetensors"))
    for key in [key for key in tensors if key.startswith("weights/")]:
        assert torch.equal(tensors.pop(key), other[key]), key
    pictures(path, tensors, meta)


def outputs_of_block(path: Path) -> dict[int, Tensor]:
    """Returns the output [B, N, D] of the last kept pair of blocks at every step, of a run that agrees with the recording."""
    recording = parity.read(path)
    found: list[Tensor] = []
    assert isinstance(recording.network, parity.STDiT3)
    recording.network.temporal_blocks[BLOCKS - 1].register_forward_hook(lambda module, args, out: found.append(out))
    result = parity.compare(recording)
    print(result)
    if not result.agrees or result.error > 1e-7:
        raise SystemExit(f"{path}: the whole run does not agree.")
    return dict(enumerate(found[-recording.steps :]))  # the sites were found in calls before the run


def clips(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Of Open-Sora under ToCa."""
    outputs = outputs_of_block(path)
    keep_calls(path.stem, tensors, meta)
    kept = {str(layer) for layer in range(BLOCKS)}
    for key in list(tensors):
        parts = key.replace("/", ".").split(".")
        layer = parts[2] if key.startswith(("weights/spatial_", "weights/temporal_")) else None
        layer = parts[3] if key.startswith("selected/") else layer
        if layer is not None and layer not in kept:
            del tensors[key]
    meta["types"] = {
        place: types for place, types in meta["types"].items() if place.strip("()").split(",")[2].strip() in kept
    }
    samples, count, width = tensors["call/000/blocks_in"].shape
    place = one_place_a_token(count, samples, width)
    token, sample = torch.arange(count).expand_as(place), torch.arange(samples)[:, None].expand_as(place)
    coordinates = torch.stack([sample, token, place], -1).flatten(0, 1)
    tensors["coordinates"] = coordinates.short()
    tensors["call/text"] = tensors["call/000/text"]
    for step in CALLS[path.stem]:
        call = f"call/{step:03d}/"
        assert torch.equal(tensors.pop(call + "text"), tensors["call/text"])
        first_half(tensors, call + "blocks_in")
        tensors[call + "blocks_out"] = outputs[step][tuple(coordinates.T)].clone()


def rectified_flow(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    for key in ("out/traj/fp64/z_steps", "out/traj/bf16args/z_steps", "out/traj_mask/z_in"):
        tensors[key] = tensors[key][STATES].clone()
    for name in ("x_embedder", "spatial_block_0", "temporal_block_0", "temporal_block_1", "final_layer"):
        tensors[f"out/stdit/{name}"] = tensors[f"out/stdit/{name}"][:, ::TOKENS].clone()
    tensors["out/stdit_nomask/pos_embed"] = positions(tensors, meta, (2, 3))
    for case in ("stdit", "stdit_xmask"):  # out64 before its cast
        assert torch.equal(tensors.pop(f"out/{case}/out"), tensors[f"out/{case}/out64"].float())
    add_sinusoids(tensors, torch.cat([tensors["in/stdit/timestep"], tensors["in/stdit/fps"], torch.zeros(1)]))


def autoencoder(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    for key in ("in/pipe/F034/video", "in/pipe/F034/noise_spatial", "in/pipe/F034/noise_temporal"):
        del tensors[key]
    for key in ("out/pipe/F034/x_z", "out/pipe/F034/z"):
        del tensors[key]
    for key in [key for key in tensors if key.startswith("out/pipe/") and key.endswith("/video")]:
        tensors[key] = tensors[key][PIXELS].clone()


CHANGES: dict[str, Change] = {
    "dit_toca_ddim50": pictures,
    "dit_duca_ddim50": duca,
    "pixart_toca_20": pictures,
    "opensora_toca_30": clips,
    "opensora_rflow": rectified_flow,
    "opensora_vae": autoencoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity.shrink_recordings", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("originals", type=Path, help="the folder of the recordings as they were given")
    parser.add_argument("output", type=Path, help="the folder to write to")
    options = parser.parse_args()
    check_this_cpu(options.originals)
    for name, change in CHANGES.items():
        path = options.originals / f"{name}.safetensors"
        tensors, meta = read(path)
        change(path, tensors, meta)
        target = options.output / path.name
        save_file(tensors, target, metadata={"meta": json.dumps(meta, separators=(",", ":"))})
        print(f"{target}: {path.stat().st_size} -> {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
