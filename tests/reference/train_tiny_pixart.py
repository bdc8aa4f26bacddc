"""Trains the reference model `tiny-pixart`: text encoder, transformer, the autoencoder's decoder, and the judge.

    python -m tests.reference.train_tiny_pixart OUT [--steps N ...]

Each stage leaves its result in OUT and is skipped when that is there; the transformer's stage also leaves a checkpoint
every few hundred steps and goes on from it. The curve of every stage is in OUT/training.STAGE.json; OUT/pipeline is
the whole pipeline folder. The autoencoder starts from tiny-dit's, and keeps its encoder: everything else is trained
from nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from sodaprof.measure.classifier import Classifier, load_classifier
from sodaprof.pipelines.load import REFERENCE
from tests.reference import scenes
from tests.reference.card import write_pixart_card
from tests.reference.training import Muon, average, rate, record, train_autoencoder

LENGTH = 20  # tokens of the longest caption; the pipeline pads further, and masks that away as it is here
TEXT = 64  # width of the text encoder
BATCH = 64
PLACES = ("left", "right", "upper", "lower")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=["text", "judge", "vae", "transformer", "card", "all"], default="all")
    parser.add_argument("--text-steps", type=int, default=2000)
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--pictures", type=int, default=120_000)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--judged", type=int, default=400, help="prompts that the model card's figures are taken from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compile the transformer's training step")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    stages = {
        "text": train_text,
        "judge": train_judge,
        "vae": train_vae,
        "transformer": train_transformer,
        "card": judge,
    }
    for name, stage in stages.items():
        if args.stage in (name, "all"):
            torch.manual_seed(args.seed)
            stage(args)


def make_tokenizer() -> T5Tokenizer:
    """One token a word, as a unigram vocabulary: needs no sentencepiece file."""
    special = ["<pad>", "</s>", "<unk>"]
    vocab = [(word, 0.0) for word in special] + [("▁" + word, -1.0) for word in scenes.vocabulary()]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def make_text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(make_tokenizer()), d_model=TEXT, d_kv=16, num_heads=4, d_ff=2 * TEXT, num_layers=2,
        relative_attention_num_buckets=16, relative_attention_max_distance=LENGTH, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config)


def encode(tokenizer: T5Tokenizer, captions: list[scenes.Caption]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, LENGTH] of captions."""
    out = tokenizer(
        [c.text for c in captions], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    return out.input_ids, out.attention_mask


def train_text(args: argparse.Namespace) -> None:
    """Teaches the encoder what a caption says, in the places where the transformer will look for it.

    The words of an object tell its shape, colour, size and place; the end of the caption tells the axis and the ground.
    What is left unsaid is not asked.
    """
    folder = args.out / "text_encoder"
    if folder.exists():
        return
    tokenizer, model = make_tokenizer(), make_text_encoder()
    asked = (len(scenes.SHAPES), len(scenes.COLOURS), len(scenes.SIZES), len(PLACES))
    whole = (2, len(scenes.GROUNDS), len(scenes.STYLES))
    of_object, of_whole = torch.nn.Linear(TEXT, sum(asked)), torch.nn.Linear(TEXT, sum(whole))
    parameters = [*model.parameters(), *of_object.parameters(), *of_whole.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    generator, start = torch.Generator().manual_seed(args.seed + 1), time.time()

    def questions(count: int, unseen: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and right answers of each question, over all words or captions that say it."""
        batch = scenes.sample(count, generator, unseen)
        captions = [scenes.caption(batch, row, generator) for row in range(count)]
        ids, mask = encode(tokenizer, captions)
        states = model(ids, attention_mask=mask).last_hidden_state
        owner = torch.zeros(ids.shape, dtype=torch.long)
        for i, c in enumerate(captions):
            owner[i, : len(c.owners)] = torch.tensor(c.owners)
        row, word = owner.nonzero(as_tuple=True)
        which = owner[row, word] - 1
        said = torch.tensor([c.says_size for c in captions])[row, which]
        place = 2 * batch.axis[row] + which
        right = [batch.shape[row, which], batch.colour[row, which], batch.size[row, which], place]
        logits = list(of_object(states[row, word]).split(asked, dim=1))
        pairs = list(zip(logits, right, strict=True))
        pairs[2] = (pairs[2][0][said], pairs[2][1][said])
        end = mask.sum(1) - 1
        on_whole = list(of_whole(states[torch.arange(count), end]).split(whole, dim=1))
        ground = torch.tensor([c.says_ground for c in captions])
        return [
            *pairs,
            (on_whole[0], batch.axis),
            (on_whole[1][ground], batch.ground[ground]),
            (on_whole[2][ground], batch.style[ground]),
        ]

    for step in range(args.text_steps):
        loss = torch.stack([F.cross_entropy(*pair) for pair in questions(128)]).mean()
        optimizer.param_groups[0]["lr"] = rate(step, args.text_steps, 2e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 249:
            record(args.out, "text", row={"step": step + 1, "loss": round(loss.item(), 5)})
    with torch.no_grad():
        right = [(logits.argmax(1) == answer).float().mean().item() for logits, answer in questions(1000, unseen=True)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(args.out / "tokenizer")
    record(args.out, "text", held_out_accuracy=round(min(right), 5), seconds=round(time.time() - start))


def train_judge(args: argparse.Namespace) -> None:
    """Trains the judge on drawings alone; it sees no caption and no picture that a model made."""
    folder = args.out / "classifier"
    if folder.exists():
        return
    heads = tuple(len(values) for values in scenes.QUESTIONS)
    model = Classifier(tuple(v for values in scenes.QUESTIONS for v in values), width=8, heads=heads, grid=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    generator, start = torch.Generator().manual_seed(args.seed + 4), time.time()
    for step in range(args.judge_steps):
        batch = scenes.sample(BATCH, generator)
        x, y = scenes.draw(batch, generator), scenes.answers(batch)
        # the autoencoder's pictures are softer and noisier than drawings: be indifferent to that
        if step % 4 == 0:
            x = F.interpolate(F.interpolate(x, scale_factor=0.7, mode="bilinear"), x.shape[-1], mode="bilinear")
        x = x + 0.06 * torch.rand(1).item() * torch.randn_like(x)
        loss = torch.stack(
            [F.cross_entropy(logits, y[:, i]) for i, logits in enumerate(model(x).split(heads, dim=1))]
        ).mean()
        optimizer.param_groups[0]["lr"] = rate(step, args.judge_steps, 4e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 249:
            record(args.out, "judge", row={"step": step + 1, "loss": round(loss.item(), 5)})
    model.eval().save(folder, torch.bfloat16)
    saved = load_classifier(args.out)
    assert saved is not None
    batch = scenes.sample(5000, generator, unseen=True)
    hits = saved.predictions(scenes.draw(batch, generator)) == scenes.answers(batch)
    accuracy = {"held_out_accuracy": hits.float().mean(0).min().item(), "all_right": hits.all(1).float().mean().item()}
    record(args.out, "judge", **accuracy, seconds=round(time.time() - start))


def train_vae(args: argparse.Namespace) -> None:
    """Trains the decoder of tiny-dit's autoencoder on scenes; the encoder, and so the latents, stay as they are."""
    folder = args.out / "vae"
    if folder.exists():
        return
    vae = AutoencoderKL.from_pretrained(REFERENCE / "tiny-dit" / "vae").float()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def pictures(count: int, generator: torch.Generator) -> torch.Tensor:
        return scenes.draw(scenes.sample(count, generator), generator)

    vae, _ = train_autoencoder(args.out, vae.to(memory_format=torch.channels_last), pictures, args.vae_steps, args.seed)
    vae.save_pretrained(folder)


def make_transformer() -> PixArtTransformer2DModel:
    """adaLN-single, 8 layers of width 128, 64 tokens; its output starts at zero, its gates do not."""
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=8, sample_size=16,
        patch_size=2, cross_attention_dim=128, caption_channels=TEXT, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[[2, 5]] = 0.3  # gates
        torch._foreach_zero_([*model.proj_out.parameters(), *model.adaln_single.linear.parameters()])
    return model


def make_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        lambda_min_clipped=-5.1,  # the cosine schedule's last steps are all noise
    )  # fmt: skip


def make_data(args: argparse.Namespace, vae: AutoencoderKL) -> tuple[torch.Tensor, ...]:
    """Scaled posterior means [n, 4, 16, 16] of fresh scenes, token ids and mask [n, LENGTH] of a caption of each."""
    path = args.out / "data.pt"
    if path.exists():
        return torch.load(path)
    tokenizer, generator, parts = make_tokenizer(), torch.Generator().manual_seed(args.seed + 2), []
    with torch.no_grad():
        for _ in range(args.pictures // 200):
            batch = scenes.sample(200, generator)
            x = vae.encode(scenes.draw(batch, generator)).latent_dist.mean * vae.config.scaling_factor
            ids, mask = encode(tokenizer, [scenes.caption(batch, row, generator) for row in range(200)])
            parts.append((x.half(), ids.to(torch.uint8), mask.to(torch.uint8)))
    data = tuple(torch.cat(p) for p in zip(*parts, strict=True))
    torch.save(data, path)
    return data


def train_transformer(args: argparse.Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(args.out / "vae").eval()
    latents, ids, mask = make_data(args, vae)
    text = T5EncoderModel.from_pretrained(args.out / "text_encoder").eval().requires_grad_(False)
    model = make_transformer().float()
    ema = copy.deepcopy(model).requires_grad_(False)
    matrices = [p for p in model.transformer_blocks.parameters() if p.ndim == 2 and min(p.shape) >= 64]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizer = torch.optim.Adam(others, lr=1e-3, betas=(0.9, 0.99), fused=True)
    muon = Muon(matrices, lr=0.01)
    alphas = make_scheduler().alphas_cumprod
    generator = torch.Generator().manual_seed(args.seed + 3)
    first, seconds, path = 0, 0.0, args.out / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        muon.averages = saved["muon"]
        generator.set_state(saved["generator"])
        first, seconds = saved["step"], saved["seconds"]
    call = torch.compile(model, dynamic=False) if args.compile else model
    nothing = torch.zeros(LENGTH, dtype=torch.long)
    nothing[0] = 1  # the empty prompt: the end alone
    start, losses = time.time() - seconds, []
    for step in range(first, args.steps):
        rows = torch.randint(0, len(latents), (BATCH,), generator=generator)
        # more of the noisy half, where it is settled what goes where
        t = (1000 * torch.sigmoid(0.3 + 1.2 * torch.randn(BATCH, generator=generator))).long()
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        drop = (torch.rand(BATCH, generator=generator) < 0.1)[:, None]
        words, seen = torch.where(drop, nothing, ids[rows].long()), torch.where(drop, nothing, mask[rows].long())
        with torch.no_grad():
            states = text(words, attention_mask=seen).last_hidden_state
        x, a = latents[rows].float(), alphas[t][:, None, None, None]
        noisy, target = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        v = call(
            noisy, encoder_hidden_states=states, encoder_attention_mask=seen, timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        loss = F.mse_loss(v, target)
        optimizer.param_groups[0]["lr"] = rate(step, args.steps, 1e-3)
        muon.lr = rate(step, args.steps, 0.01)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        muon.step()
        average(ema, model, step)
        losses.append(loss.detach())
        if step % 100 == 99:
            row = {
                "step": step + 1,
                "loss": round(torch.stack(losses).mean().item(), 4),
                "seconds": round(time.time() - start),
            }
            record(args.out, "transformer", row=row)
            losses = []
        if step % 500 == 499:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"muon": muon.averages, "generator": generator.get_state(), "step": step + 1}
            torch.save(state | {"seconds": time.time() - start}, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", path)
            export(args.out, ema)
    export(args.out, ema)
    record(args.out, "transformer", seconds=round(time.time() - start), threads=torch.get_num_threads())


def judge(args: argparse.Namespace) -> None:
    write_pixart_card(args.out, args.judged, args.seed)


def export(out: Path, ema: PixArtTransformer2DModel) -> None:
    """Writes OUT/pipeline: the whole pipeline folder in bfloat16, the judge beside it."""
    pipe = PixArtAlphaPipeline(
        T5Tokenizer.from_pretrained(out / "tokenizer"),
        T5EncoderModel.from_pretrained(out / "text_encoder", dtype=torch.bfloat16),
        AutoencoderKL.from_pretrained(out / "vae", dtype=torch.bfloat16),
        copy.deepcopy(ema).to(torch.bfloat16),
        make_scheduler(),
    )
    pipe.save_pretrained(out / "pipeline")
    shutil.copytree(out / "classifier", out / "pipeline" / "classifier", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
