"""Compiled ToCa and DuCa schedules at work, against `toca_reference`: the same tokens everywhere, the same numbers.

Networks are tiny, random and in double precision; all are called on 64 tokens, two samples with both guidance halves
in the batch, and fresh noise at each step, so that whatever is reused differs from what would have been computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

import sodaprof
from sodaprof.compiler import compile_schedule
from sodaprof.formats.cost import save_cost
from sodaprof.formats.files import write_json
from sodaprof.formats.schedule import Schedule
from sodaprof.formats.sites import Guidance, Model, Sampler
from sodaprof.opensora.network import STDiT3
from sodaprof.pipelines.discover import Step, find_sites
from tests.parity.toca_reference import Settings, Trace, recompute

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


def dit(layers: int) -> torch.nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=16, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def pixart(layers: int) -> torch.nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=16, patch_size=2, cross_attention_dim=WIDTH, caption_channels=12,
    )  # fmt: skip


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
    """As much of a scheduler as a schedule is tied to; latents come from elsewhere."""

    config: dict[str, Any] = {}  # noqa: RUF012

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
    knobs: dict[str, Any]  # what the compiler has to be told for it; all else are its defaults
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
    "dit-toca-no-tokens": Case("dit", 50, 2, Settings("toca", 3, 0.0, S1, "ddim50"), {"R": 0}),
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
    """Returns the schedule that the case's knobs compile to, by way of an inspection folder."""
    pipe = SimpleNamespace(components={"transformer": network})
    with torch.no_grad():
        transformer = find_sites(pipe, "transformer", Step([("transformer", (), call)]))
    shape = {
        "latent": list(call["hidden_states"].shape[1:]), "tokens": TOKENS, "batch_profiled": 1, "dtype": "float64"
    }  # fmt: skip
    model = Model("tiny", "Pipeline", {"transformer": transformer}, shape)
    scheduler = Scheduler()
    scheduler.set_timesteps(case.steps)
    sampler = Sampler("Scheduler", {}, tuple(scheduler.timesteps.tolist()), Guidance(form, 4.0))
    write_json(folder / "model.json", model.to_json())
    write_json(folder / "sampler.json", sampler.to_json())
    save_cost(make_cost(model), folder / "cost.flops.json")
    return compile_schedule(folder, policy=case.settings.method, knobs=case.knobs)


def check_tokens(step: int, rows: Any, wanted: dict[str, torch.Tensor]) -> None:
    """A row that did not run keeps what it last chose; one that computes all of its tokens need not choose."""
    for row in rows:
        if row.cells[step].action == "-":
            assert row.key not in wanted
        elif row.key not in wanted:
            assert row.selected is None, (step, row.key)
        elif wanted[row.key].shape[1] < row.tokens:
            assert row.selected is not None, (step, row.key)
            assert torch.equal(row.selected, wanted[row.key]), (step, row.key)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def check_run(network: Any, schedule: Schedule, calls: list[dict[str, Any]], trace: Trace) -> None:
    pipe = SimpleNamespace(components={"transformer": network}, scheduler=Scheduler())
    wide: list[torch.Tensor] = []  # Open-Sora's output before its cast to single precision
    if isinstance(network, STDiT3):
        network.final_layer.register_forward_hook(lambda module, args, out: wide.append(out))
    with sodaprof.apply(pipe, schedule) as handle:
        pipe.scheduler.set_timesteps(len(calls))
        for step, (t, call) in enumerate(zip(pipe.scheduler.timesteps, calls, strict=True)):
            out = network(**call, return_dict=False)[0]
            if wide:
                out = network.unpatchify(wide.pop(), *out.shape[2:])
            check_tokens(step, handle.rows, trace.selected[step])
            assert error(out, trace.outputs[step]) < 1e-12, step
            pipe.scheduler.step(out, t, call["hidden_states"])
        report = handle.report()
    assert report.complete
    assert report.executed == report.planned


@pytest.mark.parametrize("name", CASES)
def test_runs_are_the_methods(name, tmp_path, make_cost):
    case = CASES[name]
    torch.manual_seed(1)
    network = sharpened(MAKE[case.family](case.layers))
    scheduler = Scheduler()
    scheduler.set_timesteps(case.steps)
    calls = calls_of(case.family, scheduler.timesteps)
    schedule = compiled(case, network, calls[0], tmp_path, make_cost)

    trace = recompute(network, calls, case.settings)
    letters = trace.letters
    assert sum(word[0] == "F" != word[-1] for word in letters) == case.mixed
    assert sum(word[-1] == "A" for word in letters) == case.skipped
    assert any(trace.selected) == (case.settings.R > 0)

    check_run(network, schedule, calls, trace)
    plain = next(t for t, word in enumerate(letters) if word[-1] != "F")
    with torch.no_grad():  # the handle is off, and what is reused was not what the network computes
        assert error(network(**calls[plain]).sample.double(), trace.outputs[plain]) > 1e-3
        assert error(network(**calls[0]).sample.double(), trace.outputs[0]) < 1e-7


@pytest.mark.parametrize("family", MAKE)
def test_the_reference_computes_the_network_where_all_steps_are_full(family):
    torch.manual_seed(2)
    network = sharpened(MAKE[family](3))
    calls = calls_of(family, torch.tensor([900, 500, 100]))  # Open-Sora's first three steps are full
    settings = {
        "dit": Settings("toca", 1, 0.0, S1, "ddim50"),
        "pixart": Settings("duca", 1, 0.5, S2, "pixart"),
        "opensora": Settings("toca", 3, 0.1, S2, "opensora"),
    }[family]
    trace = recompute(network, calls, settings)
    assert trace.letters == ["FFF"] * 3
    with torch.no_grad():
        for call, out in zip(calls, trace.outputs, strict=True):
            assert error(network(**call).sample.double(), out) < (1e-7 if family == "opensora" else 1e-13)


def test_branches_in_calls_of_their_own(tmp_path, make_cost):
    """Where the halves share nothing, one call each does what both in one batch do."""
    case = CASES["dit-duca-50"]
    torch.manual_seed(3)
    network = sharpened(dit(case.layers))
    pipe = SimpleNamespace(components={"transformer": network}, scheduler=Scheduler())
    pipe.scheduler.set_timesteps(case.steps)
    calls = calls_of("dit", pipe.scheduler.timesteps)
    trace = recompute(network, calls, case.settings)

    halves = [[{k: v[i * SAMPLES : (i + 1) * SAMPLES] for k, v in call.items()} for i in (0, 1)] for call in calls]
    schedule = compiled(case, network, halves[0][0], tmp_path, make_cost, "passes")
    with torch.no_grad(), sodaprof.apply(pipe, schedule) as handle:
        pipe.scheduler.set_timesteps(case.steps)
        for step, t in enumerate(pipe.scheduler.timesteps):
            for i, half in enumerate(halves[step]):
                here = slice(i * SAMPLES, (i + 1) * SAMPLES)
                out = network(**half).sample
                check_tokens(step, handle.rows, {key: index[here] for key, index in trace.selected[step].items()})
                assert error(out, trace.outputs[step][here]) < 1e-12, (step, i)
            pipe.scheduler.step(out, t, half["hidden_states"])
        assert handle.report().executed == handle.report().planned


@torch.no_grad()
def test_random_tokens_are_the_same_in_all_samples_and_runs(tmp_path, make_cost):
    case = Case("dit", 20, 2, Settings("toca", 3, 0.1, "random", "ddim50"), {"R": 0.1, "score": "random"})
    torch.manual_seed(4)
    network = sharpened(dit(case.layers))
    pipe = SimpleNamespace(components={"transformer": network}, scheduler=Scheduler())
    pipe.scheduler.set_timesteps(case.steps)
    calls = calls_of("dit", pipe.scheduler.timesteps)
    schedule = compiled(case, network, calls[0], tmp_path, make_cost)
    runs: list[list[torch.Tensor]] = []
    with sodaprof.apply(pipe, schedule) as handle:
        for _ in range(2):
            runs.append([])
            pipe.scheduler.set_timesteps(case.steps)
            for t, call in zip(pipe.scheduler.timesteps, calls, strict=True):
                out = network(**call).sample
                runs[-1] += [row.selected.clone() for row in handle.rows if row.selected is not None]
                pipe.scheduler.step(out, t, call["hidden_states"])
    first, second = runs
    assert len(first) > 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(index, index[:1].expand_as(index)) for index in first)
    assert len({tuple(index[0].tolist()) for index in first}) == len(first)  # other ones at each site and step
