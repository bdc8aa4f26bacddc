"""The doctor: its findings in networks and pipelines, and that it changes neither."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from diffusers import DiTTransformer2DModel
from rich.console import Console
from torch import nn

import sodaprof
from sodaprof.doctor.diagnose import audit, diagnose
from sodaprof.doctor.hazards import follow
from sodaprof.errors import MismatchError
from sodaprof.report.results import diagnosis_view
from tests.tiny_pipelines import TwoPassPipeline, draw, schedule_for, tiny_pipe
from tests.zoo.zoo import ZOO


def examined(name):
    network, call = ZOO[name]()
    return audit("transformer", network, [((), call)])


def test_a_network_without_hazards_can_be_captured():
    pipe = tiny_pipe()
    result = diagnose(pipe, "tiny", 8)
    assert result["format"] == "sodaprof.doctor"
    assert result["verdict"] == {"transformer": "captures"}
    assert result["transformers"]["transformer"] == {"class": "DiTTransformer2DModel", "blocks": 2, "lowered": 2}
    assert result["scheduler"] == {"class": "DDIMScheduler", "in_loop": True}
    assert result["guidance"] == {"form": "halves", "scale": 4.0}
    (finding,) = result["findings"]  # DiT's pipeline: set_timesteps(n)
    assert (finding["where"], finding["kind"]) == ("scheduler", "timesteps")
    assert json.loads(json.dumps(result)) == result


def test_the_pipeline_is_unchanged_afterwards():
    pipe = tiny_pipe()
    before = draw(pipe)
    weights = list(pipe.transformer.parameters())
    diagnose(pipe, "tiny", 8)
    assert not {"set_timesteps", "step"} & set(vars(pipe.scheduler))
    assert all("forward" not in vars(m) or not m._diffusers_hook.hooks for m in pipe.transformer.modules())
    assert all(a is b for a, b in zip(weights, pipe.transformer.parameters(), strict=True))
    assert (draw(pipe) == before).all()
    assert torch.autocast("cpu").device == "cpu"


def test_mochi_reads_its_text_mask_in_every_block():
    about, verdict, findings = examined("MochiTransformer3DModel")
    assert verdict == "falls back"
    assert about == {"class": "MochiTransformer3DModel", "blocks": 2, "lowered": 0}
    found = next(f for f in findings if f["operator"] == "nonzero")
    assert found["where"] == "transformer.transformer_blocks.*.attn1"
    assert found["modules"] == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert found["source"].startswith("diffusers.models.attention_processor:")
    assert "torch.nonzero" in found["code"]
    (refusal,) = (f for f in findings if f["kind"] == "lowering")
    assert refusal["modules"] == ["transformer_blocks.0", "transformer_blocks.1"]


def test_experts_are_found_and_blocks_without_them_can_be_captured():
    about, verdict, findings = examined("NucleusMoEImageTransformer2DModel")
    assert verdict == "captures in part"
    assert about["lowered"] == about["blocks"] - 1
    found = next(f for f in findings if f["kind"] == "read")
    assert found["where"] == "transformer.transformer_blocks.3.img_mlp.experts"
    assert "tolist()" in found["code"]
    assert ("copy", "tensor") in {(f["kind"], f.get("operator")) for f in findings}


@pytest.mark.parametrize(
    ("name", "kind", "operator", "where"),
    [
        ("ChromaTransformer2DModel", "copy", "to_copy", "transformer.time_text_embed"),
        ("Lumina2Transformer2DModel", "read", "tolist", "transformer.rope_embedder"),
        ("GlmImageTransformer2DModel", "read", "index", "transformer"),
        ("HiDreamImageTransformer2DModel", "read", "bincount", "transformer.double_stream_blocks.*.block.ff_i"),
        ("LTX2VideoTransformer3DModel", "copy", "tensor", "transformer"),
    ],
)
def test_hazards_of_the_zoo(name, kind, operator, where):
    _, verdict, findings = examined(name)
    assert verdict != "captures"
    assert any((f["kind"], f["operator"], f["where"]) == (kind, operator, where) for f in findings if "operator" in f)


@pytest.mark.parametrize(
    ("name", "found"), [("FluxTransformer2DModel", set()), ("WanTransformer3DModel", set()), ("STDiT3", {"mask"})]
)
def test_networks_of_the_zoo_that_can_be_captured(name, found):
    about, verdict, findings = examined(name)
    assert (verdict, {f["kind"] for f in findings}) == ("captures", found)
    assert about["lowered"] == about["blocks"] > 0


def upload_once(odd, y):
    odd.uploaded = odd.table.to(y.device) if odd.uploaded is None else odd.uploaded
    return y + odd.uploaded


def no_hazard(odd, y):
    y = y.clone()
    y[y < 0] = 0.0
    y = torch.where(y > 1, y, 0.5) + torch.arange(8, device=y.device) + y.new_zeros(1)
    with torch.autocast(y.device.type, enabled=False):
        return nn.functional.dropout(y.double(), 0.1, odd.training).float().repeat_interleave(1, 0)


ODD = {  # what a module does with the output of its linear layer; kind and operator of the hazard
    "tensor": (lambda odd, y: y + torch.tensor([1.0] * 8, device=y.device), [("copy", "tensor")]),
    "new_tensor": (lambda odd, y: y * y.new_tensor([2.0]), [("copy", "new_tensor")]),
    "to": (lambda odd, y: y + odd.table.to(y.device), [("copy", "to_copy")]),
    "item": (lambda odd, y: y * y.max().item(), [("read", "item")]),
    "branch": (lambda odd, y: y if y.mean() > 0 else -y, [("read", "item")]),
    "mask": (lambda odd, y: y + y[y > 0].sum(), [("read", "index")]),
    "cpu": (lambda odd, y: y + float(y.cpu().numpy().mean()), [("read", "to_copy")]),
    "noise": (lambda odd, y: y + torch.randn_like(y), [("random", "randn_like")]),
    "scalar": (lambda odd, y: y * torch.tensor(2.0), [("frozen", "mul")]),
    "upload once": (upload_once, []),
    "nothing": (no_hazard, []),
}


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.act, self.linear, self.table = ODD[what][0], nn.Linear(8, 8), torch.arange(8.0)  # no buffer
        self.uploaded = None

    def forward(self, x):  # [B, N, 8]
        return self.act(self, self.linear(x))


@pytest.mark.parametrize("what", ODD)
def test_each_hazard_is_found_where_it_happens(what):
    network = nn.Sequential(nn.Linear(8, 8), Odd(what)).eval()
    hazards, inputs = follow(network, [((torch.randn(2, 3, 8),), {})], ["1"])
    assert [(h.kind, h.operator) for h in hazards] == ODD[what][1]
    assert type(inputs["1"][0][0]) is torch.Tensor
    for hazard in hazards:
        assert hazard.module == "1"
        assert hazard.source.startswith(f"{__name__}:")
        assert hazard.code.startswith(f'"{what}": ')
    assert network[1].uploaded is None


def test_the_examined_network_computes_its_own_values():
    network, call = ZOO["HiDreamImageTransformer2DModel"]()  # its path depends on its data
    wanted = network(**call, return_dict=False)[0].detach()
    seen = []
    network.register_forward_hook(lambda m, args, out: seen.append(out))
    follow(network, [((), {**call, "return_dict": False})], [])
    assert torch.allclose(seen[-1][0].host, wanted)


class OddDiT(DiTTransformer2DModel):
    """DiT whose second block reads a value and builds a tensor, in its feed-forward."""

    def __init__(self, **config):
        super().__init__(**config)
        self.transformer_blocks[1].ff.net[1] = Reader()


class Reader(nn.Module):
    def forward(self, x):
        return x * torch.tensor([1.0], device=x.device) if x.abs().max().item() < 1e6 else x


def test_a_pipeline_with_one_hazardous_block_captures_in_part():
    pipe = tiny_pipe()
    odd = OddDiT(**{k: v for k, v in pipe.transformer.config.items() if k[0] != "_"}).eval()
    pipe.transformer = odd
    result = diagnose(pipe, "tiny", 8)
    assert result["verdict"] == {"transformer": "captures in part"}
    assert result["transformers"]["transformer"]["lowered"] == 1
    found = {f["kind"]: f for f in result["findings"]}
    assert found["read"]["where"] == found["copy"]["where"] == "transformer.transformer_blocks.1.ff.net.1"
    assert found["read"]["operator"] == "item"
    assert found["lowering"]["where"] == "transformer.transformer_blocks.1"


def test_a_pipeline_in_two_passes_can_be_captured():
    result = diagnose(tiny_pipe(layers=1, cls=TwoPassPipeline), "tiny", 8)
    assert (result["guidance"]["form"], result["verdict"]) == ("passes", {"transformer": "captures"})


@pytest.mark.parametrize(
    ("scheduler", "kinds", "what"),
    [
        (diffusers.HeunDiscreteScheduler(), {"scheduler", "timesteps"}, "HeunDiscreteScheduler: its step runs in Python"),
        (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {"scheduler", "timesteps"},
         "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++': its step runs in Python"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), {"timesteps", "begin_index"},
         "the pipeline does not call set_begin_index"),
    ],
)  # fmt: skip
def test_schedulers(scheduler, kinds, what):
    pipe = tiny_pipe(layers=1, cls=TwoPassPipeline)
    pipe.scheduler = scheduler
    result = diagnose(pipe, "tiny", 8)
    assert result["scheduler"] == {"class": type(scheduler).__name__, "in_loop": "scheduler" not in kinds}
    assert {f["kind"] for f in result["findings"]} == kinds
    assert what in {f["what"] for f in result["findings"]}


def test_hooks_and_compiled_modules_in_a_transformer():
    from diffusers.hooks import apply_layerwise_casting

    pipe = tiny_pipe(layers=1)
    apply_layerwise_casting(pipe.transformer, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    result = diagnose(pipe, "tiny", 8)
    found = next(f for f in result["findings"] if f["kind"] == "casting")
    assert "layerwise_casting" in found["what"]
    assert len(found["modules"]) > 1
    assert result["verdict"] == {"transformer": "falls back"}

    pipe = tiny_pipe(layers=1)
    pipe.transformer = torch.compile(pipe.transformer)
    result = diagnose(pipe, "tiny", 8)
    assert "compiled" in {f["kind"] for f in result["findings"]}
    assert result["transformers"]["transformer"]["lowered"] == 1


class Adapter(nn.Linear):
    """As peft puts it around a Linear, as far as the doctor sees."""

    __module__ = "peft.tuners.lora.layer"


def test_adapters_are_allowed():
    pipe = tiny_pipe()
    for block in pipe.transformer.transformer_blocks:
        block.attn1.to_q = Adapter(16, 16)
    result = diagnose(pipe, "tiny", 8)
    found = next(f for f in result["findings"] if f["kind"] == "adapter")
    assert found["modules"] == [f"transformer_blocks.{i}.attn1.to_q" for i in (0, 1)]
    assert result["verdict"] == {"transformer": "captures"}


def test_a_model_that_no_schedule_supports_is_examined_too(monkeypatch):
    monkeypatch.setattr("sodaprof.pipelines.discover.layout_of", lambda *of_output: None)
    about, verdict, findings = examined("ErnieImageTransformer2DModel")
    assert verdict == "falls back"
    assert about["blocks"] == 0
    assert "[B, N, D]" in next(f["what"] for f in findings if f["kind"] == "sites")


def test_a_scheduled_pipeline_is_refused():
    pipe = tiny_pipe()
    with sodaprof.apply(pipe, schedule_for(pipe)), pytest.raises(MismatchError, match="remove"):
        diagnose(pipe, "tiny", 8)


def test_on_the_command_line(tmp_path, command):
    tiny_pipe().save_pretrained(tmp_path / "tiny")
    code, out, err = command("doctor", tmp_path / "tiny", "--steps", 8)
    assert (code, err) == (0, "")
    assert "transformer (DiTTransformer2DModel): captures, 2 of 2 blocks can be traced" in out
    assert out.splitlines()[-1] == f"Next: sodaprof profile {tmp_path / 'tiny'} --steps 8 -o profile"
    code, out, err = command("doctor", tmp_path / "tiny", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["verdict"] == {"transformer": "captures"}
    with (console := Console(width=80)).capture() as shown:
        console.print(diagnosis_view(result))
    assert "set_timesteps" in shown.get().replace("\n", "")
    assert max(map(len, shown.get().splitlines())) <= 80
