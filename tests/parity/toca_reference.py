"""ToCa (arXiv 2410.05317) and DuCa (arXiv 2412.18911) written out once more, plain and slow, to test the package against.

Nothing here comes from the package's compilers or runtime: each call of a network runs its blocks' submodules one by
one and decides by the methods' own counters what is computed, which tokens, and what is taken from memory. Letters: F
everything, T some tokens, A nothing (DuCa). Guidance halves stand one after the other in the batch.

B: samples, both halves counted; n: tokens; D: width; H: heads; L: layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sodaprof.opensora.layers import positions


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters under the methods' names."""

    method: str  # "toca" or "duca"
    N: int  # base period of the full steps
    R: float  # base share of tokens recomputed in between
    score: str  # "attention_received", "cross_attention_entropy" or "value_norm"
    ratio: str  # one of RATIOS
    lambda3: float = 0.25
    once_per_step: bool = False  # one decision for all layers of a step

    @property
    def duca(self) -> bool:
        return self.method == "duca"


@dataclass
class Trace:
    """What a run did, one entry a call of the network."""

    outputs: list[Tensor] = field(default_factory=list)
    letters: list[str] = field(default_factory=list)  # what the last module of each layer did
    selected: list[dict[str, Tensor]] = field(default_factory=list)  # module -> tokens [B, k], ascending; k > 0 only


# ---- when -------------------------------------------------------------------------------------------------------------


class DiTCounter:
    """DiT's counter s runs down; a full layer changes the period P at once, so the layers after it decide by the new P."""

    def __init__(self, steps: int, settings: Settings) -> None:
        self.steps, self.settings = steps, settings
        self.s, self.P = steps, settings.N
        self.of_step: str | None = None

    def begin(self, step: int) -> None:
        self.s = self.steps - 1 - step
        self.of_step = self.decide() if self.settings.once_per_step else None

    def letter(self) -> str:
        return self.of_step or self.decide()

    def is_first(self) -> bool:
        return self.s == self.steps - 1

    def decide(self) -> str:
        if self.is_first() or self.s % self.P == 0:
            return "F"
        return "A" if self.settings.duca and self.s % self.P % 2 == 0 else "T"

    def full_module_done(self, layer: int) -> None:
        """Changes the period after each module of a full block; ToCa's DiT does so in layer 0 alone."""
        if layer == 0 or self.settings.duca:
            self.P = self.period()

    def period(self) -> int:
        s, T = self.s, self.steps
        w = 0.4 if self.settings.R != 0 else 0.0
        if self.settings.R != 0 and int(0.2 * T) <= s < int(0.4 * T):
            return 2
        return self.rounded(1 + w - 2 * w * s / T)

    def rounded(self, divisor: float) -> int:
        quotient = torch.tensor(float(self.settings.N)) / torch.tensor(divisor)  # both float32
        return int(torch.round(quotient))  # half to even


class PixArtCounter(DiTCounter):
    """PixArt's counter s runs up; DuCa keeps the period."""

    def begin(self, step: int) -> None:
        self.s = step
        self.of_step = self.decide() if self.settings.once_per_step else None

    def is_first(self) -> bool:
        return self.s == 0

    def full_module_done(self, layer: int) -> None:
        self.P = self.period()

    def period(self) -> int:
        w = 0.0 if self.settings.duca or self.settings.R == 0 else 0.2
        return self.rounded(1 - w + 2 * w * self.s / self.steps)


def opensora_letter(module: str, s: int, duca: bool) -> str:
    """Open-Sora decides module by module; its periods are constants."""
    period = 6 if module == "cross_attn" else 3
    if s <= 2 or s % period == 0:
        return "F"
    if not duca:
        return "T"
    return {6: "FTATTA", 3: "FTA"}[period][s % period]


# ---- how many ---------------------------------------------------------------------------------------------------------

RATIOS: dict[str, tuple[Callable[[float, float], float], float, dict[str, float]]] = {
    # factor of the step by (s, T), weight of the layer, factors of the modules
    "ddim50": (lambda s, T: 3 - 4 * s / T, -0.2, {"ff": 2.5}),
    "ddpm250": (lambda s, T: 1.4 - 0.8 * s / T, 0.8, {"ff": 2.5}),
    "pixart": (lambda s, T: 1.9 - 1.8 * s / T, 0.6, {"attn2": 0.6, "ff": 1.6}),
    "opensora": (lambda s, T: 1.0, 0.0, {"cross_attn": 1 - 0.67 * 1.5, "mlp": 1.495}),
}


def token_count(settings: Settings, module: str, s: int, steps: int, layer: int, layers: int, n: int) -> int:
    """Returns k; the share is a float32 before it multiplies n."""
    of_step, wl, of_module = RATIOS[settings.ratio]
    share = settings.R * (1 + wl - 2 * wl * layer / (layers - 1)) * of_step(s, steps) * of_module[module]
    return int(torch.tensor(share).clamp(0, 1) * n)


# ---- which ------------------------------------------------------------------------------------------------------------


def norm2(x: Tensor) -> Tensor:
    """Returns each sample's scores [B, n] divided by their L2 norm."""
    return F.normalize(x, p=2, dim=1)


def attention_received(probabilities: Tensor) -> Tensor:
    """Returns what all queries give to each key, of [B, H, n, n]."""
    return norm2(probabilities.mean(1).sum(1))


def cross_attention_entropy(maps: Tensor) -> Tensor:
    """Returns [B, n] of head-averaged maps [B, n, text]: both halves get the entropy of their maps side by side."""
    halves = maps.chunk(2)
    q = torch.cat([0.5 * half for half in halves], -1)
    entropy = -(q * torch.log(q + 1e-7)).sum(-1)
    return norm2(1 + entropy).repeat(2, 1)


def value_norm(lengths: Tensor, mean_of_halves: bool) -> Tensor:
    """Returns [B, n] of the lengths [B, n, H] of value vectors: short ones score high."""
    if mean_of_halves:
        first, second = lengths.chunk(2)
        lengths = ((first + second) / 2).repeat(2, 1, 1)
    return norm2((1 - lengths).sum(-1))


def with_bonus(scores: list[float], grid: int, beta: float) -> list[float]:
    """Multiplies the highest score of every grid x grid block of the square raster by 1 + beta, whatever its sign."""
    side = math.isqrt(len(scores))
    scores = list(scores)
    for top in range(0, side, grid):
        for left in range(0, side, grid):
            block = [row * side + column for row in range(top, top + grid) for column in range(left, left + grid)]
            winner = max(block, key=lambda i: scores[i])
            scores[winner] *= 1 + beta
    return scores


class Memory:
    """The newest output of one module of one layer, and how long ago each token of it was computed."""

    def __init__(self) -> None:
        self.out = self.age = torch.empty(0)

    def fill(self, out: Tensor) -> None:
        self.out = out.clone()
        self.age = torch.zeros(out.shape[:2], dtype=torch.float32)

    def choose(self, settings: Settings, base: Tensor, grid: int, beta: float, k: int) -> Tensor | None:
        """Returns the k tokens of highest score, ascending, and ages the others; None for k = 0."""
        total = base + settings.lambda3 * self.age / settings.N
        self.age += 1
        if k == 0:
            return None
        chosen = []
        for sample, scores in enumerate(total.tolist()):
            if beta:
                scores = with_bonus(scores, grid, beta)
            best = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)[:k]
            chosen.append(sorted(best))
            self.age[sample, best] = 0
        return torch.tensor(chosen)

    def scatter(self, index: Tensor, rows: Tensor) -> None:
        put(self.out, index, rows)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Returns the rows [B, k, ...] of x [B, n, ...]."""
    return torch.stack([x[sample, index[sample]] for sample in range(len(x))])


def put(x: Tensor, index: Tensor, rows: Tensor) -> None:
    for sample in range(len(x)):
        x[sample, index[sample]] = rows[sample]


def heads_of(x: Tensor, heads: int) -> Tensor:
    """Returns [B, H, n, D / H] of [B, n, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_map(q: Tensor, k: Tensor, heads: int, keep: Tensor | None = None) -> Tensor:
    """Returns attention probabilities [B, H, queries, keys]; keep [B, keys], 0 where a key does not count."""
    q, k = heads_of(q, heads), heads_of(k, heads)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if keep is not None:
        logits = logits.masked_fill((keep == 0)[:, None, None], -math.inf)
    return logits.softmax(-1)


# ---- networks ---------------------------------------------------------------------------------------------------------


class Run:
    """Memory and counters of one run; `call` runs the network once."""

    def __init__(self, network: Any, steps: int, settings: Settings) -> None:
        self.network, self.steps, self.settings = network, steps, settings
        self.memory: dict[str, Memory] = {}
        self.sources: dict[str, Tensor] = {}  # of scores, by block: attention probabilities or lengths of values
        self.newest = torch.empty(0)  # output of the last block
        self.letters, self.selected = "", dict[str, Tensor]()

    def call(self, step: int, **inputs: Any) -> Tensor:
        raise NotImplementedError

    def of(self, key: str) -> Memory:
        return self.memory.setdefault(key, Memory())

    def select(self, key: str, base: Tensor, s: int, layers: int, grid: int = 1, beta: float = 0.0) -> Tensor | None:
        layer, module = int(key.split(".")[1]), key.split(".")[2]
        k = token_count(self.settings, module, s, self.steps, layer, layers, base.shape[1])
        index = self.of(key).choose(self.settings, base, grid, beta, k)
        if index is not None:
            self.selected[key] = index
        return index


class DiTRun(Run):
    def __init__(self, network: Any, steps: int, settings: Settings) -> None:
        super().__init__(network, steps, settings)
        self.counter = DiTCounter(steps, settings)

    def call(self, step: int, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        net = self.network
        self.counter.begin(step)
        x = net.pos_embed(hidden_states)
        letter = ""
        for layer, block in enumerate(net.transformer_blocks):
            letter = self.counter.letter()
            self.letters += letter
            if letter != "A":
                x = self.block(layer, block, letter, x, timestep, class_labels)
        if letter == "A":
            x = self.newest
        self.newest = x
        condition = net.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale = net.proj_out_1(F.silu(condition)).chunk(2, 1)
        patches = net.proj_out_2(net.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        return unpatchified(patches, net.config.patch_size, net.out_channels)

    def block(self, layer: int, block: Any, letter: str, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        at = f"transformer_blocks.{layer}"
        attn, ff = self.of(f"{at}.attn1"), self.of(f"{at}.ff")
        normed, gate_1, shift, scale, gate_2 = block.norm1(x, timestep, labels, hidden_dtype=x.dtype)
        if letter == "F":
            attn.fill(block.attn1(normed))
            self.remember(at, block.attn1, normed)
            self.counter.full_module_done(layer)
        x = x + gate_1[:, None] * attn.out

        def modulated(rows: Tensor) -> Tensor:
            return block.norm3(rows) * (1 + scale[:, None]) + shift[:, None]

        if letter == "F":
            ff.fill(block.ff(modulated(x)))
            self.counter.full_module_done(layer)
        else:
            source = self.sources[at]
            base = value_norm(source, False) if self.settings.score == "value_norm" else attention_received(source)
            layers = len(self.network.transformer_blocks)
            beta = 0.8 if self.settings.duca else 0.6
            index = self.select(f"{at}.ff", base, self.counter.s, layers, grid=2, beta=beta)
            if index is not None:
                ff.scatter(index, block.ff(modulated(take(x, index))))
        return x + gate_2[:, None] * ff.out

    def remember(self, at: str, attn: Any, normed: Tensor) -> None:
        if self.settings.score == "value_norm":
            self.sources[at] = attn.to_v(normed).unflatten(-1, (attn.heads, -1)).norm(dim=-1)
        else:
            self.sources[at] = softmax_map(attn.to_q(normed), attn.to_k(normed), attn.heads)


class PixArtRun(Run):
    def __init__(self, network: Any, steps: int, settings: Settings) -> None:
        super().__init__(network, steps, settings)
        self.counter = PixArtCounter(steps, settings)

    def call(
        self,
        step: int,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        net = self.network
        self.counter.begin(step)
        x = net.pos_embed(hidden_states)
        sizes = {"resolution": None, "aspect_ratio": None}
        modulation, embedded = net.adaln_single(timestep, sizes, batch_size=len(x), hidden_dtype=x.dtype)
        text = net.caption_projection(encoder_hidden_states)
        letter = ""
        for layer, block in enumerate(net.transformer_blocks):
            letter = self.counter.letter()
            self.letters += letter
            if letter != "A":
                x = self.block(layer, block, letter, x, modulation, text, encoder_attention_mask)
        if letter == "A":
            x = self.newest
        self.newest = x
        shift, scale = (net.scale_shift_table[None] + embedded[:, None]).chunk(2, 1)
        patches = net.proj_out(net.norm_out(x) * (1 + scale) + shift)
        return unpatchified(patches, net.config.patch_size, net.out_channels)

    def block(
        self, layer: int, block: Any, letter: str, x: Tensor, modulation: Tensor, text: Tensor, keep: Tensor
    ) -> Tensor:
        at = f"transformer_blocks.{layer}"
        attn, cross, ff = (self.of(f"{at}.{name}") for name in ("attn1", "attn2", "ff"))
        rows = block.scale_shift_table[None] + modulation.unflatten(-1, (6, -1))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows.chunk(6, 1)
        by_values = self.settings.score == "value_norm"
        layers = len(self.network.transformer_blocks)

        def base() -> Tensor:
            source = self.sources[at]
            return value_norm(source, True) if by_values else cross_attention_entropy(source)

        def attended(queries: Tensor) -> Tensor:
            bias = (1 - keep.to(x.dtype))[:, None] * -10_000.0
            return block.attn2(queries, encoder_hidden_states=text, attention_mask=bias)

        def text_map(queries: Tensor) -> Tensor:
            module = block.attn2
            return softmax_map(module.to_q(queries), module.to_k(text), module.heads, keep).mean(1)

        def modulated(rows: Tensor) -> Tensor:
            return block.norm2(rows) * (1 + scale_2) + shift_2

        if letter == "F":
            normed = block.norm1(x) * (1 + scale_1) + shift_1
            attn.fill(block.attn1(normed))
            if by_values:
                self.sources[at] = block.attn1.to_v(normed).unflatten(-1, (block.attn1.heads, -1)).norm(dim=-1)
            self.counter.full_module_done(layer)
        x = x + gate_1 * attn.out
        if letter == "F":
            cross.fill(attended(x))
            if not by_values:
                self.sources[at] = text_map(x)
            self.counter.full_module_done(layer)
        else:
            index = self.select(f"{at}.attn2", base(), self.counter.s, layers, grid=4, beta=0.4)
            if index is not None:
                queries = take(x, index)
                cross.scatter(index, attended(queries))
                if not by_values:
                    put(self.sources[at], index, text_map(queries))
        x = x + cross.out
        if letter == "F":
            ff.fill(block.ff(modulated(x)))
            self.counter.full_module_done(layer)
        else:
            index = self.select(f"{at}.ff", base(), self.counter.s, layers, grid=4, beta=0.4)
            if index is not None:
                ff.scatter(index, block.ff(modulated(take(x, index))))
        return x + gate_2 * ff.out


class OpenSoraRun(Run):
    def call(
        self,
        step: int,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        fps: float,
        height: float,
        width: float,
    ) -> Tensor:
        """Returns the output before the network's cast to single precision."""
        net, dtype = self.network, hidden_states.dtype
        batch, _, frames, rows, columns = hidden_states.shape
        _, patch_rows, patch_columns = net.config.patch_size
        x = net.x_embedder(hidden_states)
        unit = (height * width) ** 0.5 / net.config.input_sq_size
        grid = (-(-rows // patch_rows), -(-columns // patch_columns))
        table = positions(grid, x.shape[-1], unit, dtype, x.device)
        x = x + table.repeat(1, frames, 1)
        rates = torch.full((batch,), fps, dtype=dtype)
        embedded = net.t_embedder(timestep.to(dtype)) + net.fps_embedder(rates)
        modulation = net.t_block(embedded).unflatten(-1, (6, -1))
        text = net.y_embedder(encoder_hidden_states)[:, 0]
        x = self.blocks(step, x, modulation, text, encoder_attention_mask, frames)
        return net.unpatchify(net.final_layer(x, embedded, frames), frames, rows, columns)

    def blocks(self, step: int, x: Tensor, modulation: Tensor, text: Tensor, keep: Tensor, frames: int) -> Tensor:
        net = self.network
        letters = {name: opensora_letter(name, step, self.settings.duca) for name in ("attn", "cross_attn", "mlp")}
        if set(letters.values()) == {"A"}:
            self.letters += "A" * len(net.spatial_blocks)
            return self.newest
        rope = net.rope(frames, x.dtype)
        for layer in range(len(net.spatial_blocks)):
            self.letters += letters["mlp"]
            x = self.block(f"spatial_blocks.{layer}", letters, step, x, modulation, text, keep, frames, None)
            x = self.block(f"temporal_blocks.{layer}", letters, step, x, modulation, text, keep, frames, rope)
        self.newest = x
        return x

    def block(
        self,
        at: str,
        letters: dict[str, str],
        s: int,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        keep: Tensor,
        frames: int,
        rope: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        block, layers = self.network.get_submodule(at), len(self.network.spatial_blocks)
        attn, cross, mlp = (self.of(f"{at}.{name}") for name in ("attn", "cross_attn", "mlp"))
        rows = block.scale_shift_table[None] + modulation
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows.chunk(6, 1)
        by_values = self.settings.score == "value_norm"

        def modulated(rows: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * (1 + scale) + shift

        def into_sequences(tokens: Tensor) -> Tensor:
            """Frames' tokens (spatial) or places' frames (temporal) as sequences of their own, from (T S) order."""
            tokens = tokens.unflatten(1, (frames, -1))
            return (tokens if rope is None else tokens.transpose(1, 2)).flatten(0, 1)

        def into_tokens(sequences: Tensor) -> Tensor:
            tokens = sequences.unflatten(0, (len(x), -1))
            return (tokens if rope is None else tokens.transpose(1, 2)).flatten(1, 2)

        if letters["attn"] == "F":
            sequences = into_sequences(modulated(x, shift_1, scale_1))
            attn.fill(into_tokens(block.attn(sequences) if rope is None else block.attn(sequences, rope=rope)))
            if by_values:
                values = block.attn.qkv(sequences).chunk(3, -1)[2]
                self.sources[at] = into_tokens(values.unflatten(-1, (block.attn.heads, -1)).norm(dim=-1))
        x = x + gate_1 * attn.out
        if letters["cross_attn"] == "F":
            cross.fill(block.cross_attn(x, text, attention_mask=(keep != 0)[:, None, None]))
            if not by_values:
                module = block.cross_attn
                keys = module.kv_linear(text).chunk(2, -1)[0]
                self.sources[at] = softmax_map(module.q_linear(x), keys, module.heads, keep).mean(1)
        elif token_count(self.settings, "cross_attn", s, self.steps, 0, layers, x.shape[1]):
            raise AssertionError("Open-Sora's cross-attention never recomputes tokens")
        x = x + cross.out
        normed = modulated(x, shift_2, scale_2)
        if letters["mlp"] == "F":
            mlp.fill(block.mlp(normed))
        else:
            source = self.sources[at]
            base = value_norm(source, False) if by_values else cross_attention_entropy(source)
            index = self.select(f"{at}.mlp", base, s, layers)
            if index is not None:
                mlp.scatter(index, block.mlp(take(normed, index)))
        return x + gate_2 * mlp.out


def unpatchified(patches: Tensor, patch: int, channels: int) -> Tensor:
    """Returns [B, channels, side, side] of the patches [B, n, patch · patch · channels] of a square."""
    side = math.isqrt(patches.shape[1])
    grid = patches.reshape(-1, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


RUNS: dict[str, type[Run]] = {
    "DiTTransformer2DModel": DiTRun,
    "PixArtTransformer2DModel": PixArtRun,
    "STDiT3": OpenSoraRun,
}


@torch.no_grad()
def recompute(network: Any, calls: Sequence[dict[str, Any]], settings: Settings) -> Trace:
    """Returns what the method does in one run; `calls` are the keyword arguments of the network, one entry a step."""
    run = RUNS[type(network).__name__](network, len(calls), settings)
    trace = Trace()
    for step, inputs in enumerate(calls):
        run.letters, run.selected = "", {}
        trace.outputs.append(run.call(step, **inputs))
        trace.letters.append(run.letters)
        trace.selected.append(run.selected)
    return trace
