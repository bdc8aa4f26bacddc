"""Open-Sora's network and scheduler, against numbers recorded with the authors' code."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from sodaprof.errors import SodaprofError
from sodaprof.opensora import network as stdit3
from sodaprof.opensora.layers import ScalarEmbed, positions
from sodaprof.opensora.network import STDiT3
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from sodaprof.pipelines.discover import find_sites
from sodaprof.pipelines.recording import Step
from tests.parity.shrink_recordings import STATES, TOKENS
from tests.parity.sinusoids import largest_move, recorded_sinusoids
from tests.recorded import error, recording, under

DATA, META, WEIGHTS = recording("opensora_rflow")
CONFIG = {k: v for k, v in META["stdit"].items() if k not in ("input_size", "class_dropout_prob", "drop_path")}
# A softmax and a norm in single precision act on all of the network except these, and their last bits depend on the CPU:
# every number of both moved by one last bit, at random, moves the outputs by 9e-8 at most (20 draws).
ROUNDING = 5e-7
EXACT = ("x_embedder", "t_embedder", "fps_embedder", "y_embedder")
GUIDANCE = META["cfg_scale"]


def network(dtype: torch.dtype = torch.float64) -> STDiT3:
    model = STDiT3(**CONFIG)
    model.load_state_dict(WEIGHTS)
    return model.to(dtype).eval()


def inputs(**changes) -> dict:
    given = under("in/stdit/", DATA)
    return {
        "hidden_states": given["x"].double(), "timestep": given["timestep"].double(),
        "encoder_hidden_states": given["y"].double(), "encoder_attention_mask": given["mask"], "fps": given["fps"],
        "height": given["height"], "width": given["width"],
    } | changes  # fmt: skip


CASES = {
    "stdit": inputs(),
    "stdit_xmask": inputs(x_mask=DATA["in/stdit/x_mask"]),
    "stdit_nomask": inputs(hidden_states=DATA["in/stdit/x"].double()[..., :4, :6], encoder_attention_mask=None),
}
GRIDS = {(3, 4): "stdit", (2, 3): "stdit_nomask"}


def recorded_positions(
    grid: tuple[int, int], width: int, unit: float, dtype: torch.dtype, device: object
) -> torch.Tensor:
    return DATA[f"out/{GRIDS[grid]}/pos_embed"].to(dtype)


@torch.no_grad()
def outputs(model: STDiT3, **kwargs) -> dict[str, torch.Tensor]:
    """The outputs of the recorded submodules, of the network, and of the network before its cast to fp32.

    Of blocks, every TOKENS-th token. Sinusoids and positions are the recorded ones, whose last bits depend on the CPU.
    """
    found = {}
    named = {
        "x_embedder": model.x_embedder, "t_embedder": model.t_embedder, "fps_embedder": model.fps_embedder,
        "y_embedder": model.y_embedder, "spatial_block_0": model.spatial_blocks[0], "final_layer": model.final_layer,
        "temporal_block_0": model.temporal_blocks[0], "temporal_block_1": model.temporal_blocks[1],
    }  # fmt: skip
    with ExitStack() as stack:
        for name, module in named.items():
            keep = partial(lambda name, m, args, out: found.update({name: out}), name)
            stack.enter_context(module.register_forward_hook(keep))
        stack.enter_context(recorded_sinusoids(DATA))
        stack.enter_context(mock.patch.object(stdit3, "positions", recorded_positions))
        found["out"] = model(**kwargs).sample
    found["out64"] = model.unpatchify(found["final_layer"], *found["out"].shape[2:])
    for name in ("x_embedder", "spatial_block_0", "temporal_block_0", "temporal_block_1", "final_layer"):
        found[name] = found[name][:, ::TOKENS]
    return found


@pytest.mark.parametrize("case", CASES)
def test_network_in_double_precision(case):
    found = outputs(network(), **CASES[case])
    assert found["out"].dtype == torch.float32
    assert torch.equal(found["out"], found["out64"].float())
    for name, wanted in under(f"out/{case}/", DATA).items():
        if name != "pos_embed":
            assert error(found[name], wanted) < (1e-13 if name in EXACT else ROUNDING), name


@pytest.mark.parametrize("case", CASES)
def test_network_in_single_precision(case):
    found = outputs(network(torch.float32), **CASES[case])["out"]
    assert found.dtype == torch.float32
    assert error(found, DATA[f"out/{case}/out64"]) < 1e-5


def test_network_in_half_precision():
    model = network(torch.bfloat16)
    with torch.no_grad():
        out = model(**inputs(), return_dict=False)
    assert isinstance(out, tuple)
    assert out[0].dtype == torch.float32
    assert error(out[0], DATA["out/stdit/out64"]) < 0.05


def test_sinusoids():
    """What this CPU computes is the recorded sinusoid, as far as single precision says what it is."""
    values, recorded = DATA["sinusoid/values"], DATA["sinusoid/table"].double()
    found = ScalarEmbed(1).sinusoid(values).double()
    assert ((found - recorded).abs() <= largest_move(values)).all()
    assert largest_move(values).max() < 1e-3  # a wrong formula moves them by 1


def test_positions():
    height, width = (DATA[f"in/stdit/{side}"][0].item() for side in ("height", "width"))
    unit = (height * width) ** 0.5 / CONFIG["input_sq_size"]
    for grid, case in GRIDS.items():
        found = positions(grid, CONFIG["hidden_size"], unit, torch.float64, torch.device("cpu"))
        # Frequencies up to 1 are a power and a quotient in single precision: each CPU within 2⁻²³ and 2⁻²⁴ of the exact
        # ones. The farthest row or column, in units, turns that into an angle.
        farthest = max(grid) / unit
        assert (found - DATA[f"out/{case}/pos_embed"]).abs().max() < farthest * 2 * (2**-23 + 2**-24)


def test_all_frames_generated_is_no_mask():
    model = network()
    x_mask = torch.ones_like(DATA["in/stdit/x_mask"])
    with torch.no_grad():
        assert torch.equal(model(**inputs(x_mask=x_mask)).sample, model(**inputs()).sample)


def test_sizes_may_be_plain_numbers():
    model = network()
    numbers = {k: DATA[f"in/stdit/{k}"][0].item() for k in ("fps", "height", "width")}
    tensors = {k: torch.full((2,), v) for k, v in numbers.items()}
    with torch.no_grad():
        assert torch.equal(model(**inputs(**numbers)).sample, model(**inputs(**tensors)).sample)


def test_sites():
    """Six modules run once in each pair of blocks; those that prune give some rows of their output for some rows in."""
    pipe = SimpleNamespace(components={"transformer": network(torch.float32)})
    with torch.no_grad():
        found = find_sites(pipe, "transformer", Step([("transformer", (), inputs())])).sites
    assert {(s.stack, s.module, s.kind, s.tokens, s.prunable) for s in found} == {
        ("spatial_blocks", "attn", "attn", 12, True), ("temporal_blocks", "attn", "attn", 3, False),
        ("spatial_blocks", "cross_attn", "cross_attn", 36, True), ("spatial_blocks", "mlp", "mlp", 36, True),
        ("temporal_blocks", "cross_attn", "cross_attn", 36, True), ("temporal_blocks", "mlp", "mlp", 36, True),
    }  # fmt: skip
    assert len(found) == 2 * 6
    assert [s.key for s in found[:4]] == [
        "spatial_blocks.0.attn", "spatial_blocks.0.cross_attn", "spatial_blocks.0.mlp", "temporal_blocks.0.attn",
    ]  # fmt: skip


def test_runs_without_weights():
    """On the meta device, on which FLOPs are counted, sizes are numbers."""
    model = network().to("meta")
    given = inputs(fps=24, height=40, width=56, x_mask=DATA["in/stdit/x_mask"])
    out = model(**{k: v.to("meta") if torch.is_tensor(v) else v for k, v in given.items()}).sample
    assert (out.shape, out.dtype) == ((4, 8, 3, 5, 7), torch.float32)


def test_some_frames_alone_are_refused():
    attn = network().temporal_blocks[0].attn
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    rope = network().rope(3, torch.float64)
    with pytest.raises(ValueError, match="all frames"):
        attn(x[:, :2], encoder_hidden_states=x, rope=rope)


def test_a_folder_without_rotary_frequencies_is_loaded(tmp_path):
    """Published weights may come without them."""
    model = network(torch.float32)
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "rope.freqs"}, path, metadata={"format": "pt"})
    model.rope.freqs = STDiT3(**CONFIG).rope.freqs  # the recorded ones are another CPU's
    loaded = STDiT3.from_pretrained(tmp_path)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**inputs()).sample, model(**inputs()).sample)


def test_weights_without_rotary_frequencies():
    model = STDiT3(**CONFIG)
    model.load_state_dict({k: v for k, v in WEIGHTS.items() if k != "rope.freqs"})
    # a power in single precision: each CPU within one last bit, 2⁻²³, of the exact one
    torch.testing.assert_close(model.rope.freqs, WEIGHTS["rope.freqs"], rtol=2 * 2**-23, atol=0)


def test_a_patch_is_one_frame():
    with pytest.raises(ValueError, match="one frame"):
        STDiT3(**CONFIG | {"patch_size": (2, 2, 2)})


TIMESTEPS = {  # recording -> settings, number of steps, size
    "linear": ({"use_timestep_transform": False}, 30, ()),
    "fp32_10/240x426x51": ({}, 10, (240, 426, 51)),
} | {
    name: ({"size_dtype": {"fp32": "float32", "bf16": "bfloat16"}[name[:4]]}, 30, tuple(map(int, name[5:].split("x"))))
    for name in under("out/timesteps/", DATA) if name[:5] in ("fp32/", "bf16/")
}  # fmt: skip


@pytest.mark.parametrize("recorded", TIMESTEPS)
def test_timesteps(recorded):
    """Seven operations in single precision, each within 2⁻²⁴; the one sum, 1 + (ρ − 1) s, cancels by less than half."""
    settings, steps, size = TIMESTEPS[recorded]
    scheduler = RectifiedFlowScheduler(**settings)
    scheduler.set_timesteps(steps, None, *size)
    torch.testing.assert_close(scheduler.timesteps, DATA[f"out/timesteps/{recorded}"], rtol=8 * 2**-24, atol=0)


def test_a_size_is_needed_and_few_frames_have_no_timesteps():
    scheduler = RectifiedFlowScheduler()
    with pytest.raises(SodaprofError, match="needs height"):
        scheduler.set_timesteps(30)
    for frames in (0, 2, 16):
        with pytest.raises(SodaprofError, match="undefined"):
            scheduler.set_timesteps(30, height=240, width=426, num_frames=frames)


def toy_velocity(z: torch.Tensor, t: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The guided velocity of the recording's model: both halves in one batch, channels beyond the first 4 dropped."""
    z, mean = torch.cat([z, z]), mean[:, None, None, None, None]
    v = 0.5 * torch.sin(3 * z) + (t / 1000 * mean).double() - 0.25 * z
    with_text, without = v.chunk(2)
    return without + GUIDANCE * (with_text - without)


def trajectory_scheduler(size_dtype: str = "float32") -> RectifiedFlowScheduler:
    scheduler = RectifiedFlowScheduler(size_dtype=size_dtype)
    sizes = {k: META["traj"][k] for k in ("height", "width", "num_frames")}
    scheduler.set_timesteps(META["num_sampling_steps"], **sizes)
    return scheduler


TRAJECTORY = 1e-12  # double precision through 30 steps
# The mean of each text, in single precision as in the recording: the order of the sum, and so its last bit, depends on the
# CPU. With these the trajectories are the recorded ones to the last bit of double precision.
TEXT = torch.tensor([-0.0329457372, -0.116188496, 0.0167880226, 0.0167880226])


@pytest.mark.parametrize(("case", "size_dtype"), [("fp64", "float32"), ("bf16args", "bfloat16")])
def test_trajectory(case, size_dtype):
    scheduler = trajectory_scheduler(size_dtype)
    z = DATA["in/traj/z"].double()
    for i, t in enumerate(scheduler.timesteps):
        if i in STATES:
            assert error(z, DATA[f"out/traj/{case}/z_steps"][STATES.index(i)]) < TRAJECTORY
        z = scheduler.step(toy_velocity(z, t, TEXT), t, z).prev_sample
    assert error(z, DATA[f"out/traj/{case}/final"]) < TRAJECTORY


def test_the_means_of_the_texts():
    """A sum of 30 numbers in single precision is within 29 · 2⁻²⁴ of the sum of their sizes; two roundings follow."""
    text = torch.cat([DATA["in/traj/y"], DATA["in/traj/y_null"]]).double()
    limit = 31 * 2**-24 * text.abs().mean((1, 2, 3))
    assert ((TEXT - text.mean((1, 2, 3))).abs() <= limit).all()


def test_trajectory_with_frames_kept():
    scheduler = trajectory_scheduler()
    mask, noise, wanted = DATA["in/traj_mask/mask"], DATA["in/traj_mask/noise"].double(), under("out/traj_mask/", DATA)
    z = DATA["in/traj/z"].double()
    seen = mask == 1
    for i, t in enumerate(scheduler.timesteps):
        upper = mask * 1000 >= t
        assert torch.equal(torch.cat([upper, upper]), wanted["x_mask"][i])
        renewed = (upper & ~seen)[:, None, :, None, None]
        z = torch.where(renewed, scheduler.add_noise(z, noise[i], t), z)
        if i in STATES:
            assert error(z, wanted["z_in"][STATES.index(i)]) < TRAJECTORY
        moved = scheduler.step(toy_velocity(z, t, TEXT), t.item(), z, return_dict=False)[0]
        z = torch.where(upper[:, None, :, None, None], moved, z)
        seen = upper
    assert error(z, wanted["final"]) < TRAJECTORY


def test_noise_of_a_batch_of_timesteps():
    scheduler = RectifiedFlowScheduler()
    x, noise = torch.ones(2, 4, 3, 3, 4), torch.full((2, 4, 3, 3, 4), 3.0)
    found = scheduler.add_noise(x, noise, torch.tensor([0.0, 500.0]))
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[1], 2 * x[1])
