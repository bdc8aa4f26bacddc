"""Checks schedules at work against recorded runs of the authors' code of ToCa and DuCa.

    python -m tests.parity.parity FILE... [--json]

A recording holds a network's weights (or the name of one beside it that does), calls of it with their outputs, and
every set of tokens that was recomputed in them.
The check builds the network in double precision, compiles the schedule that the recorded arguments ask for, applies it
to a pipeline that feeds the recorded inputs call by call, and compares step types, token sets and outputs. Calls may be
left out before a step that computes everything: the network is then called with the inputs of the call before, and
nothing is compared.

Exit code: 0 where all of them agree, 1 where they do not or a file cannot be compared, 2 usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from msgspec.structs import replace
from safetensors import safe_open
from torch import Tensor

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.errors import FormatError, SodaprofError
from sodaprof.formats.cost import CostModel, SiteCost, StepCost, TransformerCost, save_cost
from sodaprof.formats.files import checked, write_json
from sodaprof.formats.schedule import Plan, Schedule
from sodaprof.formats.sites import Guidance, Model, Sampler
from sodaprof.opensora.network import STDiT3 as Network
from sodaprof.pipelines.discover import Step, find_sites
from tests.parity.original import load_dit, load_pixart

from .sinusoids import recorded_sinusoids

TOLERANCE = 1e-5  # of outputs, relative to the largest number of each; recorded ones are rounded to single precision
SHOWN = 3  # places that are named of all that differ
NAME = "transformer"
LETTER = {"C": "F", "R": "T", "P": "T", "-": "A"}  # of a cell: full, partial, aggressive
VALUE_NORM = ("kv-norm", "kv_norm", "v-norm", "value-norm", "value_norm")

# ---- recordings -------------------------------------------------------------------------------------------------------


class Recording:
    """One trace file. `step` counts up from 0; the authors' counter runs down for DiT."""

    modules: ClassVar[dict[str, str]]  # recorded name of a module -> its path in a block
    base: ClassVar[str]  # score of cache type "attention"
    ratio: ClassVar[str]  # schedule of ratios that the recording calls ToCa
    output: ClassVar[str] = "out"  # what every call has
    descending: ClassVar[bool] = False

    def __init__(self, path: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.path, self.tensors, self.meta = path, tensors, meta
        self.args: dict[str, Any] = meta["args"]
        self.weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        self.steps = int(self.args["steps"])
        self.calls = sorted(
            int(name.split("/")[1]) for name in tensors if re.fullmatch(rf"call/\d+/{self.output}", name)
        )
        if not self.calls or self.calls[0] != 0 or self.calls[-1] >= self.steps:
            raise FormatError(f"{path}: calls {self.calls} recorded, expected calls of {self.steps} steps, from 0 on.")
        for call, details in meta.get("calls", {}).items():
            if details.get("step", self.counter(int(call))) != self.counter(int(call)):
                raise FormatError(
                    f"{path}: call {call} is of step {details['step']}, expected {self.counter(int(call))}."
                )
        self.network = self.build()

    def build(self) -> torch.nn.Module:
        """Returns the network in double precision."""
        raise NotImplementedError

    def arguments(self, step: int) -> dict[str, Any]:
        """Returns what the network is called with at this step."""
        raise NotImplementedError

    def found(self, output: Any) -> Tensor:
        """Returns the recorded part of what a call returned."""
        return self.part(output.sample, self.at(0, self.output).shape)

    def part(self, output: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns the recorded coordinates of an output, or as many channels of it as are recorded."""
        coordinates = self.tensors.get("coordinates")  # [n, axes]
        return output[:, : shape[1]] if coordinates is None else output[tuple(coordinates.long().T)]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise FormatError(f"{self.path}: no {name}; expected it in a recording of {type(self.network).__name__}.")
        return self.tensors[name]

    def at(self, step: int, name: str) -> Tensor:
        """Returns a value of one call, which may be recorded once for all of them."""
        shared = self.tensors.get(f"call/{name}")
        return self[f"call/{step:03d}/{name}"] if shared is None else shared

    def both_halves(self, step: int, name: str, batch: int) -> Tensor:
        """Returns an input [batch, …] in double precision; one guidance half may be recorded for both."""
        value = self.at(step, name).double()
        return value.repeat(batch // len(value), *(1,) * (value.ndim - 1))

    def counter(self, step: int) -> int:
        return self.steps - 1 - step if self.descending else step

    def policy(self) -> tuple[str, dict[str, Any]]:
        """Returns the policy and the knobs that the recorded arguments ask for; FormatError where there are none such."""
        args = self.args
        policy, kind = str(args["repo"]).lower(), str(args["cache_type"])
        named = str(args.get("ratio_scheduler", args.get("fresh_ratio_schedule", "ToCa")))
        ratio = {"ToCa": self.ratio, "ToCa-ddim50": "ddim50", "ToCa-ddpm250": "ddpm250"}.get(named)
        score = {"attention": self.base}.get(kind, "value_norm" if kind.lower() in VALUE_NORM else None)
        for name, value, known in (
            ("repo", policy, policy in ("toca", "duca")),
            ("cache_type", kind, score),
            ("ratio schedule", named, ratio),
            ("full", args.get("full", False), not args.get("full", False)),
            ("force_fresh", args.get("force_fresh", "global"), args.get("force_fresh", "global") == "global"),
        ):
            if not known:
                raise FormatError(f"{self.path}: {name} {value!r} cannot be compared: no schedule says the same.")
        return policy, {
            "N": int(args["fresh_threshold"]), "R": float(args["fresh_ratio"]),
            "lambda3": float(args.get("soft_fresh_weight", 0.25)), "score": score, "ratio": ratio,
        }  # fmt: skip

    def amended(self, schedule: Schedule) -> Schedule:
        """Returns the schedule with what no knob says."""
        return schedule

    def site(self, branch: str, layer: str, module: str) -> str:
        """Returns the key of a recorded place."""
        return f"transformer_blocks.{layer}.{self.modules[module]}"

    def selections(self) -> dict[tuple[int, str], Tensor]:
        """Returns the recorded tokens [B, k] by step and site."""
        found = {}
        for name, tokens in self.tensors.items():
            if name.startswith("selected/"):
                counter, *place = name.split("/")[1:]
                module = "mlp" if place[-1].isdigit() else place.pop()  # DiT chooses for the MLP alone
                branch, layer = ["", *place][-2:]
                found[self.counter(int(counter)), self.site(branch, layer, module)] = tokens.long()
        return found

    def letters(self) -> dict[tuple[int, str], str]:
        """Returns the recorded step types (F, T or A) by step and site."""
        return {
            (self.counter(int(counter)), self.site("", str(layer), module)): letter
            for counter, word in self.meta["types"].items()
            for layer, letter in enumerate(word)
            for module in self.modules
        }


class DiTRecording(Recording):
    modules: ClassVar = {"attn": "attn1", "mlp": "ff"}
    base, ratio, descending = "attention_received", "ddim50", True

    def build(self) -> torch.nn.Module:
        return load_dit(self.weights, torch.float64, heads=self.meta["cfg"]["heads"])

    def arguments(self, step: int) -> dict[str, Any]:
        t, labels = self.at(step, "t"), self["labels"]
        x = self.both_halves(step, "x", len(t))
        if len(labels) < len(x):  # of the first half alone; the other is of no class
            labels = torch.cat([labels, torch.full_like(labels, self.network.config.num_embeds_ada_norm)])
        return {"hidden_states": x, "timestep": t, "class_labels": labels}


class PixArtRecording(Recording):
    modules: ClassVar = {"attn": "attn1", "cross-attn": "attn2", "mlp": "ff"}
    base, ratio = "cross_attention_entropy", "pixart"

    def build(self) -> torch.nn.Module:
        return load_pixart(self.weights, torch.float64, heads=self.meta["cfg"]["heads"])

    def arguments(self, step: int) -> dict[str, Any]:
        t, mask = self.at(step, "t"), self["mask"]
        return {
            "hidden_states": self.both_halves(step, "x", len(t)),
            "timestep": t,
            "encoder_hidden_states": torch.cat([self["null"], self["cap"]])[:, 0].double(),
            "encoder_attention_mask": mask.repeat(len(t) // len(mask), 1),  # both halves to the prompt's length
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }


class STDiT3(Network):
    """The blocks of the network under its name: what comes before them is rounded by the CPU, and recorded."""

    def forward(self, hidden_states: Tensor, text: Tensor, modulation: Tensor, mask: Tensor, frames: int) -> Tensor:
        """Returns the tokens [B, N, D] that the last block gives for those of the first; see STDiT3Block."""
        rope = self.rope(frames, hidden_states.dtype)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            hidden_states = spatial(hidden_states, text, modulation, mask, frames)
            hidden_states = temporal(hidden_states, text, modulation, mask, frames, rope=rope)
        return hidden_states


ALL_AGGRESSIVE = "all_aggressive"


class OpenSoraRecording(Recording):
    modules: ClassVar = {"attn": "attn", "cross-attn": "cross_attn", "mlp": "mlp"}
    base, ratio, output = "cross_attention_entropy", "opensora", "blocks_out"

    def build(self) -> torch.nn.Module:
        weights, config = self.weights, dict(self.meta.get("cfg") or {})
        width, channels, *patch = weights["x_embedder.proj.weight"].shape
        network = STDiT3(
            in_channels=channels,
            patch_size=tuple(patch),
            hidden_size=width,
            depth=len({name.split(".")[1] for name in weights if name.startswith("spatial_blocks.")}),
            num_heads=config.get("heads", width // (2 * len(weights["rope.freqs"]))),
            mlp_ratio=len(weights["spatial_blocks.0.mlp.fc1.bias"]) / width,
            pred_sigma=len(weights["final_layer.linear.bias"]) == 2 * channels * math.prod(patch),
            caption_channels=weights["y_embedder.y_embedding"].shape[1],
            model_max_length=len(weights["y_embedder.y_embedding"]),
            qk_norm="spatial_blocks.0.attn.q_norm.weight" in weights,
        )
        network.load_state_dict(weights)
        return network.double().eval()

    def arguments(self, step: int) -> dict[str, Any]:
        """From the first block on: the rounding of what comes before depends on the CPU."""
        call = self.meta["calls"][str(step)]
        parts = self.at(step, "text")[0].double().split(call["text_lens"])  # of all items, one after the other
        text = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        mask = torch.arange(text.shape[1]) < torch.tensor(call["text_lens"])[:, None]
        modulation = self.at(step, "t_mod").double().unflatten(-1, (6, -1))[:, None]
        return {
            "hidden_states": self.both_halves(step, "blocks_in", len(modulation)),
            "text": text,
            "modulation": modulation,
            "mask": mask[:, None, None],
            "frames": call["T"],
        }

    def found(self, output: Any) -> Tensor:
        return self.part(output, self.at(0, self.output).shape)

    def policy(self) -> tuple[str, dict[str, Any]]:
        """The published code's periods are 3 and 6, whatever N is."""
        policy, knobs = super().policy()
        return policy, knobs | {"N": 3}

    def amended(self, schedule: Schedule) -> Schedule:
        """Returns the schedule with N where the published code has it: in the weight of a token's age."""
        if schedule.token_rule is None:
            return schedule
        period = float(self.args["fresh_threshold"])
        return replace(schedule, token_rule=replace(schedule.token_rule, age_period=period))

    def site(self, branch: str, layer: str, module: str) -> str:
        stack = {"0": "spatial_blocks", "-1": "temporal_blocks"}[branch]
        return f"{stack}.{layer}.{self.modules[module]}"

    def letters(self) -> dict[tuple[int, str], str]:
        found = {}
        for place, types in self.meta["types"].items():  # "(step, branch, layer)": {module: type}
            step, branch, layer = (part.strip() for part in place.strip("()").split(","))
            for module, word in types.items():
                if (
                    module == ALL_AGGRESSIVE
                ):  # of DuCa: whether the layer skips every module; their own types say the same
                    if not isinstance(word, bool):
                        raise ValueError(f"{place}: {module} is {word!r}, expected true or false")
                    continue
                found[int(step), self.site(branch, layer, module)] = word[0].upper()  # of full, ToCa, aggressive
        return found


def read(path: str | Path) -> Recording:
    """Returns the recording in `path`; FormatError where it is broken or of another kind."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["meta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "weights_in" in meta:  # of the recording of this name, beside it
            with safe_open(Path(path).with_name(f"{meta['weights_in']}.safetensors"), "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys() if name.startswith("weights/")}  # noqa: SIM118
        if "weights/spatial_blocks.0.attn.qkv.weight" in tensors:
            return OpenSoraRecording(str(path), tensors, meta)
        if "weights/blocks.0.cross_attn.q_linear.weight" in tensors:
            return PixArtRecording(str(path), tensors, meta)
        return DiTRecording(str(path), tensors, meta)
    except SodaprofError:
        raise
    except Exception as error:  # a file of another kind fails wherever it differs
        raise FormatError(f"{path}: no recording that can be compared ({type(error).__name__}: {error}).") from error


# ---- the check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one recording was compared in. Sets are of one site, step and sample; types of one site and step."""

    path: str
    model: str
    policy: str
    knobs: dict[str, Any]
    calls: int
    sets: int
    set_mismatches: tuple[str, ...]
    types: int
    type_mismatches: tuple[str, ...]
    error: float  # largest difference of an output, relative to the largest number of that output
    error_step: int

    @property
    def agrees(self) -> bool:
        return not self.set_mismatches and not self.type_mismatches and self.error <= TOLERANCE

    def __str__(self) -> str:
        knobs = " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.knobs.items())
        lines = [
            f"{Path(self.path).name}: {'agrees' if self.agrees else 'DIFFERS'} ({self.model}, {self.policy} {knobs})",
            f"  outputs of {self.calls} calls: largest relative error {self.error:.1e}, at step {self.error_step}",
        ]
        for what, count, places in (
            ("token sets", self.sets, self.set_mismatches),
            ("step types", self.types, self.type_mismatches),
        ):
            lines.append(f"  {what}: {count} compared, {len(places)} differ")
            lines += [f"    {place}" for place in places[:SHOWN]]
        return "\n".join(lines)


class Scheduler:
    """Counts the steps down and moves nothing: the next call's input is recorded too."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, steps: int) -> None:
        self.timesteps = torch.arange(steps, 0, -1)

    def set_timesteps(self, steps: int) -> None:
        """A run begins."""

    def step(self, model_output: Any, timestep: Tensor, sample: Tensor) -> Tensor:
        return sample


def compile_for(recording: Recording, pipe: Any) -> Schedule:
    """Returns the schedule of the recorded arguments, compiled from a folder as the command line does."""
    policy, knobs = checked(recording.policy, recording.path)
    given = recording.arguments(0)
    transformer = find_sites(pipe, NAME, Step([(NAME, (), given)]))
    latent = list(given["hidden_states"].shape[1:])
    shape = {"latent": latent, "tokens": transformer.sites[-1].tokens, "batch_profiled": 1, "dtype": "float64"}
    timesteps = tuple(pipe.scheduler.timesteps.tolist())
    sampler = Sampler(Scheduler.__name__, {}, timesteps, Guidance("halves", float(recording.args["cfg_scale"])))
    costs = {site.key: SiteCost(1.0, 0.0, (0.0,) * 4, ((site.tokens, 1.0),)) for site in transformer.sites}
    cost = CostModel(
        "flops", "meta", "float64", 1, shape["tokens"], {NAME: TransformerCost(StepCost(0.0, 0.0, (0.0,) * 4), costs)},
        {"scheduler": 0.0, "update": 0.0, "guidance": 0.0}, {"text_encoder": None, "vae": None},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Model("recorded", "recorded", {NAME: transformer}, shape)
        write_json(folder / "model.json", model.to_json())
        write_json(folder / "sampler.json", sampler.to_json())
        save_cost(cost, folder / "cost.flops.json")
        return recording.amended(compile_schedule(folder, policy=policy, knobs=knobs))


def chosen(handle: Any, plan: Plan, step: int) -> dict[str, Tensor]:
    """Returns the tokens [B or 1, k] that each site recomputed at this step, of those that recomputed some."""
    found = {}
    for row in handle.executor.rows:
        k = plan.k[row.key][plan.cell(row.key, step, "P")] if plan.rows[row.key][step] == "P" else 0
        if k == plan.tokens(row.key):  # all of them are no selection
            found[row.key] = torch.arange(k)[None]
        elif k:
            found[row.key] = row.selected
    return found


def compare_sets(recorded: dict[str, Tensor], found: dict[str, Tensor], step: int, batch: int) -> tuple[int, list[str]]:
    """Returns how many sets were compared at this step, and the places where they differ."""
    count, places = 0, []
    for site in sorted({*recorded, *found}):
        wanted, ours = (
            [set(tokens) for tokens in side[site].expand(batch, -1).tolist()] if site in side else [set()] * batch
            for side in (recorded, found)
        )
        for sample, (a, b) in enumerate(zip(wanted, ours, strict=True)):
            count += bool(a or b)
            if a != b:
                places.append(
                    f"step {step}, {site}, sample {sample}: {len(a - b)} tokens recorded alone, {len(b - a)} here alone, "
                    f"such as {min(a ^ b)}"
                )
    return count, places


def check_gaps(recording: Recording, schedule: Schedule) -> None:
    """Raises FormatError where calls are left out before a step that takes anything from them."""
    for before, after in pairwise(recording.calls):
        letters = {row[after] for row in schedule.transformers[NAME].rows.values()}
        if after != before + 1 and letters != {"C"}:
            raise FormatError(
                f"{recording.path}: call {after} needs those before it, and call {after - 1} is left out."
            )


def compare_types(recording: Recording, schedule: Schedule) -> tuple[int, list[str]]:
    """Returns how many step types were compared, and the places where they differ."""
    rows, places = schedule.transformers[NAME].rows, []
    recorded = checked(recording.letters, recording.path)
    for (step, site), wanted in sorted(recorded.items()):
        found = LETTER[rows[site][step]] if site in rows else "nothing"
        if found != wanted:
            places.append(f"step {step}, {site}: {found}, recorded {wanted}")
    return len(recorded), places


def check(path: str | Path) -> Result:
    """Returns how a recording compares with this project's schedule of the same arguments, run on the recorded inputs.

    Raises FormatError where the file is no recording, or of arguments that no schedule repeats (random tokens).
    """
    recording = read(path)
    with recorded_sinusoids(recording.tensors):
        return compare(recording)


@torch.no_grad()
def compare(recording: Recording) -> Result:
    pipe = SimpleNamespace(components={NAME: recording.network}, scheduler=Scheduler(recording.steps))
    schedule = compile_for(recording, pipe)
    check_gaps(recording, schedule)
    types, type_mismatches = compare_types(recording, schedule)
    recorded = checked(recording.selections, recording.path)
    sets, set_mismatches, worst, worst_step = 0, [], 0.0, 0
    with sodaprof.apply(pipe, schedule) as handle:
        pipe.scheduler.set_timesteps(recording.steps)
        for step in range(recording.calls[-1] + 1):
            if step in recording.calls:
                given = recording.arguments(step)
            found = recording.network(**given)
            if step in recording.calls:
                ours, wanted = recording.found(found), recording.at(step, recording.output)
                error = ((ours - wanted).abs().max() / wanted.abs().max()).item()
                if error > worst or math.isnan(error):
                    worst, worst_step = error, step
            if recorded and step in recording.calls:
                wanted_here = {site: tokens for (t, site), tokens in recorded.items() if t == step}
                found_here = chosen(handle, schedule.transformers[NAME], step)
                count, places = compare_sets(wanted_here, found_here, step, len(given["hidden_states"]))
                sets, set_mismatches = sets + count, set_mismatches + places
            pipe.scheduler.step(found, pipe.scheduler.timesteps[step], given["hidden_states"])
    return Result(
        recording.path, type(recording.network).__name__, schedule.policy["name"], schedule.policy["knobs"],
        len(recording.calls), sets, tuple(set_mismatches), types, tuple(type_mismatches), worst, worst_step,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Prints one result a file and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="a recording (.safetensors)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    results, good = [], True
    for path in options.files:
        try:
            result = check(path)
        except SodaprofError as error:
            results.append({"path": path, "agrees": False, "reason": str(error)})
            good = False
            text = f"{Path(path).name}: NOT COMPARED: {error}"
        else:
            results.append({"agrees": result.agrees} | dataclasses.asdict(result))
            good &= result.agrees
            text = str(result)
        if not options.json:
            print(text)
    if options.json:
        print(json.dumps(results, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
