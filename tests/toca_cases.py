"""Networks, calls and settings of ToCa and DuCa, and the schedules that the compiler makes for them.

Networks are tiny, random and in double precision; all are called on 64 tokens, two samples with both guidance halves
in the batch, and fresh noise at each step, so that whatever is reused differs from what would have been computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from sodaprof.compiler import compile_schedule
from sodaprof.formats.cost import save_cost
from sodaprof.formats.files import write_json
from sodaprof.formats.schedule import Schedule
from sodaprof.formats.sites import Guidance, Model, Sampler
from sodaprof.opensora.network import STDiT3
from sodaprof.pipelines.discover import Step, find_sites
from tests.parity.toca_reference import Settings

HEADS, WIDTH, SAMPLES, TOKENS, TEXT = 2, 16, 2, 64, 7
LENGTHS = (3, 7, 5, 2)  # text tokens that count, of each sample in each half

# ---- networks, in memory ----------------------------------------------------------------------------------------------


def sharpened(network: torch.nn.Module) -> torch.nn.Module:
    """Returns the network in double precision with larger queries, so that its attention is not nearly uniform."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "to_q" in name or "q_linear" in name:
                parameter *= 6
            elif name.endswith("qkv.weight"):
                parameter[:WIDTH] *= 6
    return network.double().eval()


def dit(layers: int, cls: type = DiTTransformer2DModel, **more: Any) -> torch.nn.Module:
    return cls(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=16, patch_size=2, **more or {"num_embeds_ada_norm": 10},
    )  # fmt: skip


def pixart(layers: int) -> torch.nn.Module:
    return dit(layers, PixArtTransformer2DModel, cross_attention_dim=WIDTH, caption_channels=12)


def opensora(layers: int) -> torch.nn.Module:
    return STDiT3(
        hidden_size=WIDTH, num_heads=HEADS, depth=layers, caption_channels=12, model_max_length=TEXT, qk_norm=True
    )


MAKE = {"dit": dit, "pixart": pixart, "opensora": opensora}


def calls_of(family: str, timesteps: torch.Tensor) -> list[dict[str, Any]]:
    """Returns the network's arguments a step: both halves see the same latents, each sample its own label or text."""
    batch = 2 * SAMPLES
    size = (4, 4, 8, 8) if family == "opensora" else (4, 16, 16)
    text = torch.randn(batch, TEXT, 12, dtype=torch.float64)
    mask = (torch.arange(TEXT) < torch.tensor(LENGTHS)[:, None]).long()
    calls = []
    for t in timesteps:
        x = torch.randn(SAMPLES, *size, dtype=torch.float64).repeat(2, *[1] * len(size))
        call = {"hidden_states": x, "timestep": t.expand(batch)}
        if family == "dit":
            call |= {"class_labels": torch.tensor([3, 7, 10, 10])}
        else:
            call |= {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        if family == "opensora":
            call |= {"encoder_hidden_states": text[:, None], "fps": 24.0, "height": 64.0, "width": 64.0}
        calls.append(call)
    return calls


class Scheduler:
    """The part of a scheduler that a schedule depends on; latents are given."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, steps: int = 0) -> None:
        self.set_timesteps(steps)

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.linspace(999, 1, steps).long()

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> None: ...


# ---- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    family: str  # one of MAKE
    steps: int
    layers: int
    settings: Settings  # what the method has to be run with
    knobs: dict[str, Any]  # of the compiler; the others are its defaults
    mixed: int = 0  # steps in which layer 0 alone is full
    skipped: int = 0  # steps of the stack, mixed ones counted


S1, S2, VALUES = "attention_received", "cross_attention_entropy", "value_norm"
CASES = {
    "dit-toca-50": Case("dit", 50, 4, Settings("toca", 3, 0.07, S1, "ddim50"), {}, mixed=2),
    "dit-duca-50": Case("dit", 50, 4, Settings("duca", 3, 0.05, S1, "ddim50"), {}, mixed=2, skipped=9),
    "dit-toca-250": Case("dit", 250, 2, Settings("toca", 4, 0.07, S1, "ddpm250"), {}, mixed=2),
    "dit-toca-values": Case("dit", 50, 4, Settings("toca", 3, 0.07, VALUES, "ddim50"), {"score": VALUES}, mixed=2),
    "dit-duca-values": Case(
        "dit", 50, 2, Settings("duca", 3, 0.05, VALUES, "ddim50"), {"score": VALUES}, mixed=2, skipped=9
    ),
    "dit-toca-28-layers": Case("dit", 10, 28, Settings("toca", 3, 0.07, S1, "ddim50"), {}, mixed=2),
    "dit-toca-once": Case(
        "dit", 50, 3, Settings("toca", 3, 0.07, S1, "ddim50", once_per_step=True), {"once_per_step": 1}
    ),
    "dit-duca-once": Case(
        "dit", 50, 3, Settings("duca", 3, 0.05, S1, "ddim50", once_per_step=True), {"once_per_step": 1}, skipped=8
    ),
    "dit-toca-little-age": Case(
        "dit", 25, 3, Settings("toca", 5, 0.2, S1, "ddim50", lambda3=0.01), {"N": 5, "R": 0.2, "lambda3": 0.01}, mixed=3
    ),
    "dit-duca-no-tokens": Case("dit", 50, 2, Settings("duca", 3, 0.0, S1, "ddim50"), {"R": 0}, skipped=16),
    "pixart-toca-20": Case("pixart", 20, 4, Settings("toca", 3, 0.3, S2, "pixart"), {}, mixed=1),
    "pixart-duca-20": Case("pixart", 20, 4, Settings("duca", 3, 0.75, S2, "pixart"), {}, skipped=6),
    "pixart-duca-few": Case("pixart", 20, 4, Settings("duca", 3, 0.3, S2, "pixart"), {"R": 0.3}, skipped=6),
    "pixart-toca-values": Case("pixart", 20, 4, Settings("toca", 3, 0.3, VALUES, "pixart"), {"score": VALUES}, mixed=1),
    "pixart-toca-once": Case(
        "pixart", 20, 3, Settings("toca", 3, 0.3, S2, "pixart", once_per_step=True), {"once_per_step": 1}
    ),
    "pixart-toca-no-tokens": Case("pixart", 20, 2, Settings("toca", 3, 0.0, S2, "pixart"), {"R": 0}),
    "pixart-toca-little-age": Case(
        "pixart", 20, 4, Settings("toca", 3, 0.3, S2, "pixart", lambda3=0.01), {"lambda3": 0.01}, mixed=1
    ),
    "opensora-toca-30": Case("opensora", 30, 2, Settings("toca", 3, 0.1, S2, "opensora"), {}),
    "opensora-toca-little-age": Case(
        "opensora", 18, 2, Settings("toca", 3, 0.3, S2, "opensora", lambda3=0.005), {"R": 0.3, "lambda3": 0.005}
    ),
    "opensora-duca-30": Case("opensora", 30, 2, Settings("duca", 3, 0.1, VALUES, "opensora"), {}, skipped=9),
    "opensora-toca-28-layers": Case("opensora", 6, 28, Settings("toca", 3, 0.1, S2, "opensora"), {}),
    "opensora-duca-entropy": Case(
        "opensora", 10, 3, Settings("duca", 3, 0.3, S2, "opensora"), {"R": 0.3, "score": S2}, skipped=2
    ),
}


def compiled(
    case: Case, network: Any, call: dict[str, Any], folder: Any, make_cost: Any, form: str = "halves"
) -> Schedule:
    """Returns the schedule that the case's knobs compile to; writes an inspection of the network to the folder."""
    pipe = SimpleNamespace(components={"transformer": network})
    with torch.no_grad():
        transformer = find_sites(pipe, "transformer", Step([("transformer", (), call)]))
    shape = {
        "latent": list(call["hidden_states"].shape[1:]), "tokens": TOKENS, "batch_profiled": 1, "dtype": "float64"
    }  # fmt: skip
    model = Model("tiny", "Pipeline", {"transformer": transformer}, shape)
    sampler = Sampler("Scheduler", {}, tuple(Scheduler(case.steps).timesteps.tolist()), Guidance(form, 4.0))
    write_json(folder / "model.json", model.to_json())
    write_json(folder / "sampler.json", sampler.to_json())
    save_cost(make_cost(model), folder / "cost.flops.json")
    return compile_schedule(folder, policy=case.settings.method, knobs=case.knobs)
