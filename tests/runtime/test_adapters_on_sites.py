"""Adapters and quantised layers on modules that are sites themselves: what an adapter adds is cached with the site's output."""

from __future__ import annotations

import diffusers
import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import sodaprof
from sodaprof.errors import UnsupportedModelError
from tests.tiny_flux import ENDS, draw, flux_pipe, flux_schedule

TARGETS = (
    r"single_transformer_blocks\.\d+\.(proj_out|proj_mlp)"  # a site, and a Linear that is none in spite of its name
)
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def schedule():
    return flux_schedule(flux_pipe())


def put_on(pipe, kind="lora", name="first", seed=1):
    """Puts an adapter on, with weights that move the picture."""
    if kind == "loha":
        config = LoHaConfig(r=2, alpha=4, target_modules=TARGETS, init_weights=False)
    else:
        config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False, use_dora=kind == "dora")
    inject_adapter_in_model(config, pipe.transformer, name).eval()
    noise = torch.Generator().manual_seed(seed)
    for path, parameter in pipe.transformer.named_parameters():
        if name in path and ("lora_A" in path or "lora_B" in path or "hada" in path):
            parameter.data.copy_(torch.randn(parameter.shape, generator=noise) * 0.3)
        elif name in path:  # DoRA's magnitudes
            parameter.data *= 1.2


def layers(pipe):
    return [m for m in pipe.transformer.modules() if isinstance(m, BaseTunerLayer)]


def without_wrappers(pipe):
    """Merges the adapters that are on and puts plain Linears in place of what wraps them."""
    for path, module in list(pipe.transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            pipe.transformer.set_submodule(path, module.base_layer)


def merged(schedule, *adapters, change=lambda pipe: None):
    """Returns the picture with the adapters merged into plain weights."""
    pipe = flux_pipe()
    for adapter in adapters:
        put_on(pipe, **adapter)
    change(pipe)
    without_wrappers(pipe)
    with sodaprof.apply(pipe, schedule):
        return draw(pipe)


def distance(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    ("kind", "runtime"), [("lora", "hooks"), ("dora", "hooks"), ("loha", "hooks"), ("lora", "compiled")]
)
def test_an_adapter_is_in_what_is_cached(schedule, kind, runtime):
    wanted = merged(schedule, {"kind": kind})
    pipe = flux_pipe()
    plain = draw(pipe)
    with sodaprof.apply(pipe, schedule, runtime=runtime) as handle:
        assert distance(draw(pipe), wanted) > 0.05
        put_on(pipe, kind)
        for _ in range(2):
            assert distance(draw(pipe), wanted) < ROUNDING
        assert handle.report().executed == handle.report().planned
    assert all("forward" not in vars(m) and "forward" not in vars(m.base_layer) for m in layers(pipe))
    with sodaprof.apply(pipe, schedule, runtime=runtime) as handle:  # on before the schedule
        assert distance(draw(pipe), wanted) < ROUNDING
        assert handle.report().executed == handle.report().planned
        for path, module in list(pipe.transformer.named_modules()):  # and taken off under it
            if isinstance(module, BaseTunerLayer):
                pipe.transformer.set_submodule(path, module.base_layer)
        without = draw(pipe)
    assert torch.equal(draw(pipe), plain)
    with sodaprof.apply(pipe, schedule):
        assert distance(draw(pipe), without) < ROUNDING


@pytest.mark.parametrize("runtime", ["hooks", "compiled"])
def test_several_adapters_fused_unfused_and_swapped(schedule, runtime):
    two = {"name": "first"}, {"name": "second", "seed": 2}

    def weigh(pipe):
        for layer in layers(pipe):
            layer.set_adapter(["first", "second"])
            layer.set_scale("first", 0.5)
            layer.set_scale("second", 1.5)

    wanted, first = merged(schedule, *two, change=weigh), merged(schedule, {"name": "first"})
    pipe = flux_pipe()
    with sodaprof.apply(pipe, schedule, runtime=runtime):
        put_on(pipe)
        assert distance(draw(pipe), first) < ROUNDING
        put_on(pipe, **two[1])
        weigh(pipe)
        both = draw(pipe)
        assert distance(both, wanted) < ROUNDING
        for layer in layers(pipe):
            layer.merge()
        assert distance(draw(pipe), wanted) < ROUNDING
        for layer in layers(pipe):
            layer.unmerge()
        assert distance(draw(pipe), wanted) < ROUNDING
        swapped = merged(schedule, {"name": "first", "seed": 3})
        for layer in layers(pipe):
            layer.set_scale("first", 1.0)
            layer.set_adapter(["first"])
        noise = torch.Generator().manual_seed(3)  # other values into the same adapter, as a hot-swap does
        for path, parameter in pipe.transformer.named_parameters():
            if ".first" in path:
                parameter.data.copy_(torch.randn(parameter.shape, generator=noise) * 0.3)
        assert distance(draw(pipe), swapped) < ROUNDING


class QuantizedLinear(nn.Module):
    """A quantised layer that is no nn.Linear, as nunchaku's are: known by its features."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("levels", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.levels * self.scale, self.bias)


class QuantizedSubclass(nn.Linear):
    """A quantised layer that is an nn.Linear, as those of bitsandbytes and gguf are."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 64).round() / 64, self.bias)


@pytest.mark.parametrize("quantized", [QuantizedLinear, QuantizedSubclass])
def test_quantised_layers_have_the_same_sites(schedule, quantized):
    pipe = flux_pipe()
    for path, module in list(pipe.transformer.named_modules()):
        if path in ENDS or path.endswith("proj_mlp"):
            pipe.transformer.set_submodule(path, quantized(module))
    assert flux_schedule(pipe).transformers == schedule.transformers
    pictures = []
    for runtime in ("hooks", "compiled"):
        with sodaprof.apply(pipe, schedule, runtime=runtime) as handle:
            pictures.append(draw(pipe))
            assert handle.report().executed == handle.report().planned
    assert torch.equal(*pictures)


class Levels(torch.Tensor):
    """A weight that is a tensor subclass without memory of its own, as torchao's are: it knows `linear` and little else."""

    @staticmethod
    def __new__(cls, levels, scale):
        return torch.Tensor._make_wrapper_subclass(cls, levels.shape, dtype=scale.dtype, device=scale.device)

    def __init__(self, levels, scale):
        self.levels, self.scale = levels, scale

    def dequantize(self):
        return self.levels * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return nn.functional.linear(args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].levels, args[0].scale)
        raise NotImplementedError(f"Levels: {function}")


class Packed(nn.Parameter):
    """A weight of bytes, scales and levels in one row, which knows its kind, as those of gguf and bitsandbytes do."""

    def __new__(cls, data, kind="q8"):
        made = torch.Tensor._make_subclass(cls, data, require_grad=False)
        made.kind = kind
        return made


class PackedLinear(nn.Linear):
    """A Linear whose weight has another shape than it says, as diffusers' GGUFLinear."""

    def forward(self, x):
        assert self.weight.kind == "q8"
        return nn.functional.linear(x, self.dequantized(), self.bias)

    def dequantized(self):
        scale, levels = self.weight[:, :4].contiguous().view(torch.float32), self.weight[:, 4:].view(torch.int8)
        return levels * scale


def quantized_in_8_bits(linear, packed):
    """Returns the layer and the weight that it computes with."""
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    levels = (linear.weight.detach() / scale).round().to(torch.int8)
    if packed:
        made = PackedLinear(linear.in_features, linear.out_features)
        made.weight = Packed(torch.cat([scale.view(torch.uint8), levels.view(torch.uint8)], 1))
        made.bias = linear.bias
        return made, made.dequantized()
    linear.weight = nn.Parameter(Levels(levels, scale), requires_grad=False)
    return linear, linear.weight.dequantize()


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_another_kind_run_by_hooks_and_are_refused_or_right_compiled(schedule, packed):
    pipe, other = flux_pipe(), flux_pipe()
    for path, module in list(pipe.transformer.named_modules()):
        if "blocks" in path and isinstance(module, nn.Linear):
            made, weight = quantized_in_8_bits(module, packed)
            pipe.transformer.set_submodule(path, made)
            other.transformer.get_submodule(path).weight.data.copy_(weight)
    plain = draw(pipe)
    assert torch.equal(plain, draw(other))
    assert distance(plain, draw(flux_pipe())) > 10 * ROUNDING
    assert flux_schedule(pipe).transformers == schedule.transformers
    with sodaprof.apply(other, schedule):
        wanted = draw(other)
    with sodaprof.apply(pipe, schedule) as handle:
        assert torch.equal(draw(pipe), wanted)
        assert handle.report().executed == handle.report().planned
    with (
        sodaprof.apply(pipe, schedule, runtime="compiled"),
        pytest.raises(UnsupportedModelError, match=r'cannot be traced .* Run the schedule with runtime="hooks"'),
    ):
        draw(pipe)
    assert torch.equal(draw(pipe), plain)
    if not packed:  # a weight that is quantised when its block was traced before, without a change of shape
        pipe = flux_pipe()
        with sodaprof.apply(pipe, schedule, runtime="compiled"):
            draw(pipe)
            quantized_in_8_bits(pipe.transformer.get_submodule(ENDS[0]), packed)
            with pytest.raises(UnsupportedModelError, match="has a weight of class Levels"):
                draw(pipe)


def test_loras_that_diffusers_loads(schedule, tmp_path):
    donor = flux_pipe()
    put_on(donor, name="default")
    states = {path: p for path, p in donor.transformer.state_dict().items() if "lora_" in path}
    states = {f"transformer.{path.replace('.default', '')}": p for path, p in states.items()}
    wanted = merged(schedule, {"name": "default"})
    pipe = flux_pipe()
    with sodaprof.apply(pipe, schedule):
        without = draw(pipe)
        pipe.load_lora_weights(states)
        loaded = draw(pipe)
        assert distance(loaded, without) > 0.05
        pipe.fuse_lora()
        assert distance(draw(pipe), loaded) < ROUNDING
        pipe.unfuse_lora()
        assert distance(draw(pipe), loaded) < ROUNDING
        pipe.unload_lora_weights()
        assert distance(draw(pipe), without) < ROUNDING
    assert distance(wanted, without) > 0.05
    assert isinstance(pipe, diffusers.FluxPipeline)
