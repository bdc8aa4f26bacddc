"""Trains the reference model `tiny-opensora` from nothing: both halves of the autoencoder, then text encoder and network.

    python -m tests.reference.train_tiny_opensora OUT [--stage NAME --steps N ...]

Each stage leaves its result in OUT and is skipped when that is there; the network's stage also leaves a checkpoint every
few hundred steps and goes on from it. The curve of every stage is in OUT/training.STAGE.json; OUT/pipeline is the whole
pipeline folder. Nothing judges by something learned: `motions.read` says what a clip shows.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from sodaprof.opensora.autoencoder import AutoencoderKLOpenSora
from sodaprof.opensora.network import STDiT3
from sodaprof.opensora.pipeline import OpenSoraPipeline
from sodaprof.opensora.prompts import with_scores
from sodaprof.opensora.scheduler import RectifiedFlowScheduler
from tests.reference import motions, scenes
from tests.reference.card import write_opensora_card
from tests.reference.linear_start import start_linear, start_linear_in_time
from tests.reference.training import Muon, average, rate, record, train_autoencoder

LENGTH = 16  # tokens of the longest caption with its score and the end
TEXT = 64  # width of the text encoder
FPS = 24.0
AES = 6.5  # the score that the pipeline puts behind prompts
SEED = 2_000_000  # of the first judged clip: apart from calibration and evaluation seeds
JUDGED_AT_ONCE = 8
VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 24), "layers_per_block": 1, "norm_num_groups": 1, "filters": 16,
    "channel_multipliers": (1, 1, 1), "num_res_blocks": 1, "temporal_downsample": (True, True), "num_groups": 1,
    "micro_batch_size": 17,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=["spatial", "temporal", "network", "judge", "all"], default="all")
    parser.add_argument("--spatial-steps", type=int, default=8000)
    parser.add_argument("--temporal-clips", type=int, default=4000)
    parser.add_argument("--temporal-steps", type=int, default=1800)
    parser.add_argument("--clips", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--judged", type=int, default=200, help="clips of held-out prompts that are sampled and read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="compile the network's training step: 3 minutes, then faster"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    stages = {"spatial": train_spatial, "temporal": train_temporal, "network": train_network, "judge": judge}
    for name, stage in stages.items():
        if args.stage in (name, "all"):
            torch.manual_seed(args.seed)
            stage(args)


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in −1…1."""
    return -10 * math.log10(((found - wanted) / 2).square().mean().item())


def clips_of(count: int, generator: torch.Generator, unseen: bool = False) -> Tensor:
    return motions.draw(motions.sample(count, generator, unseen), generator)


def train_spatial(args: argparse.Namespace) -> None:
    """The autoencoder of single frames: twice halved, 3 × 32 × 32 to 4 × 8 × 8."""
    folder = args.out / "spatial"
    if folder.exists():
        return

    def frames(count: int, generator: torch.Generator) -> Tensor:
        """Frames of fresh clips, at most 4 of each."""
        clips = clips_of(-(-count // 4), generator).transpose(1, 2)
        kept = torch.randint(0, motions.FRAMES, (len(clips), 4), generator=generator)
        return clips[torch.arange(len(clips))[:, None], kept].flatten(0, 1)[:count].to(args.device)

    vae = AutoencoderKLOpenSora(**VAE).spatial_vae.module.to(args.device)
    start_linear(vae)
    trained, deviation = train_autoencoder(args.out, vae, frames, args.spatial_steps, args.seed)
    trained.register_to_config(scaling_factor=round(1 / deviation, 5))
    trained.save_pretrained(folder)


def make_vae(args: argparse.Namespace) -> AutoencoderKLOpenSora:
    """The autoencoder with the trained spatial half; its latents have unit variance between the halves."""
    spatial = type(AutoencoderKLOpenSora(**VAE).spatial_vae.module).from_pretrained(args.out / "spatial")
    vae = AutoencoderKLOpenSora(
        **VAE, spatial_factor=spatial.config.scaling_factor, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
    )
    vae.spatial_vae.module.load_state_dict(spatial.state_dict())
    return vae


def train_temporal(args: argparse.Namespace) -> None:
    """The temporal half, 17 frames of 4 × 8 × 8 to 5, on latents of the spatial half, which stays as it is."""
    folder = args.out / "vae"
    if folder.exists():
        return
    vae = make_vae(args).to(args.device).requires_grad_(False)
    start_linear_in_time(vae.temporal_vae)
    half = vae.temporal_vae.requires_grad_(True)
    ema = copy.deepcopy(half).requires_grad_(False)
    optimizer = torch.optim.Adam(half.parameters(), lr=2e-3)
    generator, start = torch.Generator().manual_seed(args.seed + 2), time.time()
    with torch.no_grad():
        known = torch.cat(
            [
                vae.spatial_vae.encode(clips_of(20, generator).to(args.device), sample=False).cpu()
                for _ in range(args.temporal_clips // 20)
            ]
        )
    for step in range(args.temporal_steps):
        x = known[torch.randint(0, len(known), (16,), generator=generator)].to(args.device)
        mean, log_variance = half.moments(x).chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        noise = torch.randn(mean.shape, generator=generator).to(args.device)
        y = half.decode(mean + torch.exp(0.5 * log_variance) * noise, motions.FRAMES)
        spread = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        frame = int(torch.randint(0, motions.FRAMES, (1,), generator=generator))
        shown, wanted = (vae.spatial_vae.decode(z[:, :, frame : frame + 1]) for z in (y, x))
        loss = (y - x).abs().mean() + (shown - wanted).abs().mean() + 1e-4 * spread
        descend(optimizer, loss, half.parameters(), rate(step, args.temporal_steps, 2e-3))
        average(ema, half, step)
        if step % 250 == 0:
            row = {"step": step, "loss": round(loss.item(), 4), "psnr_db": round(psnr(shown, wanted), 2)}
            deviation = torch.exp(0.5 * log_variance).mean().item()
            record(args.out, "temporal", row=row | {"posterior_std": round(deviation, 3)})
    vae.temporal_vae = ema
    held_out = torch.Generator().manual_seed(args.seed + 999_979)
    with torch.no_grad():
        latents = torch.cat([half_of(vae, known[i : i + 50].to(args.device)) for i in range(0, len(known), 50)])
        shift, scale = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=tuple(shift.tolist()), latents_std=tuple(scale.tolist()))
        vae.shift.copy_(shift.reshape(1, -1, 1, 1, 1))
        vae.scale.copy_(scale.reshape(1, -1, 1, 1, 1))
        batch = motions.sample(60, held_out, unseen=True)
        x = motions.draw(batch, held_out).to(args.device)
        y = vae(x).cpu()
    vae.cpu().save_pretrained(folder)
    record(
        args.out, "temporal", held_out_psnr_db=round(psnr(y, x.cpu()), 2), read_right=shares(y, batch),
        seconds=round(time.time() - start),
    )  # fmt: skip


def half_of(vae: AutoencoderKLOpenSora, x: Tensor) -> Tensor:
    """Means of the temporal half of spatial latents [B, C, F, H, W]."""
    return vae.temporal_vae.moments(x).chunk(2, 1)[0]


def shares(clips: Tensor, batch: motions.Motions) -> dict[str, float]:
    """Returns how often a clip shows the right shape, colour and direction, and all of them."""
    names = (scenes.SHAPES, tuple(scenes.COLOURS), tuple(motions.DIRECTIONS))
    right = []
    for i, clip in enumerate(clips):
        found = motions.read(clip)
        asked = (batch.shape[i], batch.colour[i], batch.direction[i])
        seen = (found.shape, found.colour, found.direction)
        right.append([a == known[int(b)] for a, known, b in zip(seen, names, asked, strict=True)])
    each = torch.tensor(right).float()
    shape, colour, direction = each.mean(0).tolist()
    return {"shape": shape, "colour": colour, "direction": direction, "all": each.prod(1).mean().item()}


def descend(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[torch.nn.Parameter], speed: float
) -> None:
    optimizer.param_groups[0]["lr"] = speed
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def make_tokenizer() -> T5Tokenizer:
    """One token a word, as a unigram vocabulary: needs no sentencepiece file."""
    words = [*motions.vocabulary(), *with_scores("", AES, None, None).split()]
    vocab = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")] + [("▁" + word, -1.0) for word in words]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def make_text_encoder(words: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=words, d_model=TEXT, d_kv=16, num_heads=4, d_ff=2 * TEXT, num_layers=2,
        relative_attention_num_buckets=16, relative_attention_max_distance=LENGTH, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config)


def make_network() -> STDiT3:
    """8 + 8 blocks of width 88 over 5 frames of 16 tokens; starts with every output zero."""
    model = STDiT3(
        input_sq_size=motions.SIZE, hidden_size=88, depth=8, num_heads=4, pred_sigma=False, caption_channels=TEXT,
        model_max_length=LENGTH,
    )  # fmt: skip
    with torch.no_grad():
        for block in (*model.spatial_blocks, *model.temporal_blocks):
            table = block.get_parameter("scale_shift_table")
            table.zero_()
            table[[2, 5]] = 0.3  # gates
        torch._foreach_zero_([*model.final_layer.linear.parameters(), *model.t_block.parameters()])
    return model


def make_data(args: argparse.Namespace, vae: AutoencoderKLOpenSora) -> tuple[Tensor, motions.Motions]:
    """Latents fp16 [n, 4, 5, 8, 8] of fresh clips and what they show; kept in OUT."""
    path = args.out / "data.pt"
    if path.exists():
        latents, indices = torch.load(path)
        return latents, motions.Motions(*indices)
    generator, parts, shown = torch.Generator().manual_seed(args.seed + 3), [], []
    vae = vae.to(args.device)
    with torch.no_grad():
        for _ in range(args.clips // 40):
            batch = motions.sample(40, generator)
            parts.append(vae.encode(motions.draw(batch, generator).to(args.device), sample=False).half().cpu())
            shown.append(torch.stack([batch.shape, batch.colour, batch.direction, batch.ground]))
    data = (torch.cat(parts), torch.cat(shown, 1))
    torch.save(data, path)
    return data[0], motions.Motions(*data[1])


class Trained(torch.nn.Module):
    """What the network's stage trains together: the text encoder and the network."""

    def __init__(self, text: T5EncoderModel, network: STDiT3) -> None:
        super().__init__()
        self.text, self.network = text, network


def train_network(args: argparse.Namespace) -> None:
    vae = AutoencoderKLOpenSora.from_pretrained(args.out / "vae").eval()
    latents, shown = make_data(args, vae)
    tokenizer = make_tokenizer()
    both = Trained(make_text_encoder(len(tokenizer)), make_network()).to(args.device)
    ema = copy.deepcopy(both).requires_grad_(False)
    blocks = torch.nn.ModuleList([*both.network.spatial_blocks, *both.network.temporal_blocks])
    matrices = [p for p in blocks.parameters() if p.ndim == 2 and min(p.shape) >= 64]
    others = [p for p in both.parameters() if not any(p is m for m in matrices)]
    optimizer = torch.optim.Adam(others, lr=1e-3, betas=(0.9, 0.99), fused=True)
    muon = Muon(matrices, lr=0.01)
    muon.averages = [a.to(args.device) for a in muon.averages]
    generator = torch.Generator().manual_seed(args.seed + 4)
    first, seconds, path = 0, 0.0, args.out / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, map_location=args.device)
        both.load_state_dict(saved["both"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        muon.averages = saved["muon"]
        generator.set_state(saved["generator"].cpu())
        first, seconds = saved["step"], saved["seconds"]
    call = torch.compile(both.network, dynamic=False) if args.compile else both.network
    start, losses, size = time.time() - seconds, [], float(motions.SIZE)
    for step in range(first, args.steps):
        rows = torch.randint(0, len(latents), (args.batch,), generator=generator)
        # more of the noisy half, where it is settled what goes where
        t = torch.sigmoid(0.3 + 1.2 * torch.randn(args.batch, generator=generator))
        noise = torch.randn(args.batch, *latents.shape[1:], generator=generator)
        drop = (torch.rand(args.batch, generator=generator) < 0.1)[:, None, None]
        batch = shown[rows]
        texts = [with_scores(motions.caption(batch, i, generator), AES, None, None) for i in range(args.batch)]
        tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        ids, mask = tokens.input_ids.to(args.device), tokens.attention_mask.to(args.device)
        x, noise, t, drop = (v.to(args.device) for v in (latents[rows].float(), noise, t, drop))
        states = both.text(ids, attention_mask=mask).last_hidden_state
        states = torch.where(drop, both.network.y_embedder.y_embedding, states)
        part = t[:, None, None, None, None]
        v = call((1 - part) * x + part * noise, 1000 * t, states[:, None], mask, FPS, size, size, return_dict=False)[0]
        loss = F.mse_loss(v, x - noise)
        muon.lr = rate(step, args.steps, 0.01)
        both.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.param_groups[0]["lr"] = rate(step, args.steps, 1e-3)
        optimizer.step()
        muon.step()
        average(ema, both, step)
        losses.append(loss.detach())
        if step % 100 == 99:
            mean = round(torch.stack(losses).mean().item(), 4)
            record(args.out, "network", row={"step": step + 1, "loss": mean, "seconds": round(time.time() - start)})
            losses = []
        if step % 500 == 499:
            state: dict[str, Any] = {
                "both": both.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            state |= {"muon": muon.averages, "generator": generator.get_state(), "step": step + 1}
            torch.save(state | {"seconds": time.time() - start}, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", path)
            export(args.out, ema, tokenizer)
    export(args.out, ema, tokenizer)
    record(args.out, "network", seconds=round(time.time() - start), device=args.device, threads=torch.get_num_threads())


def export(out: Path, ema: Trained, tokenizer: T5Tokenizer) -> None:
    """Writes OUT/pipeline: the whole pipeline folder in bfloat16."""
    parts = copy.deepcopy(ema).cpu().to(torch.bfloat16)
    pipe = OpenSoraPipeline(
        tokenizer, parts.text, parts.network,
        AutoencoderKLOpenSora.from_pretrained(out / "vae", dtype=torch.bfloat16),
        RectifiedFlowScheduler(use_timestep_transform=False),  # made for sizes from 144p on
        height=motions.SIZE, width=motions.SIZE, num_frames=motions.FRAMES, clean_caption=False,
    )  # fmt: skip
    pipe.save_pretrained(out / "pipeline")


def judge(args: argparse.Namespace) -> None:
    """Samples clips of held-out prompts from OUT/pipeline as anyone would, and reads what they show."""
    pipe = OpenSoraPipeline.from_pretrained(args.out / "pipeline").to(args.device)
    pipe.set_progress_bar_config(disable=True)
    words = torch.Generator().manual_seed(args.seed + 5)
    batch, found, start = motions.sample(args.judged, words, unseen=True), [], time.time()
    for first in range(0, args.judged, JUDGED_AT_ONCE):
        rows = range(first, min(first + JUDGED_AT_ONCE, args.judged))
        generators = [torch.Generator().manual_seed(SEED + i) for i in rows]
        prompts = [motions.caption(batch, i, words) for i in rows]
        found.append(pipe(prompts, generator=generators, output_type="pt").frames.transpose(1, 2).cpu() * 2 - 1)
    told = shares(torch.cat(found), batch)
    disk = sum(p.stat().st_size for p in (args.out / "pipeline").rglob("*") if p.is_file())
    record(
        args.out, "judge", held_out=told, judged=args.judged, first_seed=SEED, bytes=disk,
        seconds=round(time.time() - start),
    )  # fmt: skip
    write_opensora_card(args.out)
    print(told, disk)


if __name__ == "__main__":
    main()
