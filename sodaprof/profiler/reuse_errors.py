"""The error of reuse and pruning at one site and step: its past outputs against the present one (SODA, OFS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .budget import Grid

TINY = 1e-20


@dataclass
class StaleErrors:
    """Errors of one site at one step on one branch, for the ages 1…A in order; float32."""

    whole: torch.Tensor  # [B, A, 3]: 1 − cosine (mean over tokens), relative L1, relative L2 of the whole output
    tokens: torch.Tensor  # [N, A]: 1 − cosine a token, summed over B; [M, A] after `pooled`
    pruned: torch.Tensor  # [B, A, rates]: E_p with the kept tokens ranked by the stale output's feature mean


class Ring:
    """The last A outputs of one site, [B, N, A, D], with their norms and ranks; B may hold several branches.

    `scratch` holds the differences, by shape; rings that share it use one buffer for them.
    """

    def __init__(self, ages: int, rates: torch.Tensor, scratch: dict[torch.Size, torch.Tensor] | None = None) -> None:
        self.ages, self.rates = ages, rates
        self.scratch = {} if scratch is None else scratch
        self.outputs: torch.Tensor | None = None
        self.norms: torch.Tensor  # [B, N, A]
        self.order: torch.Tensor  # [B, N, A]: tokens by falling feature mean
        self.step = 0

    def push(self, x: torch.Tensor) -> StaleErrors | None:
        """Returns the errors of all past outputs against x [B, N, D], and keeps x; None at the first step."""
        if self.outputs is None:
            b, n, d = x.shape
            self.outputs = x.new_empty(b, n, self.ages, d)
            self.norms = x.new_empty(b, n, self.ages, dtype=torch.float32)
            self.order = torch.empty(b, n, self.ages, dtype=torch.int64, device=x.device)
            self.kept = kept_tokens(self.rates, n)
            if self.outputs.shape not in self.scratch:
                self.scratch[self.outputs.shape] = torch.empty_like(self.outputs, dtype=torch.float32)
        full = x.float()
        norm = torch.linalg.vector_norm(full, dim=-1)
        errors = self._errors(self.outputs, full, norm) if self.step else None
        slot = self.step % self.ages
        self.outputs[:, :, slot] = x
        self.norms[:, :, slot] = norm
        self.order[:, :, slot] = full.abs().mean(-1).argsort(dim=1, descending=True)
        self.step += 1
        return errors

    def _errors(self, outputs: torch.Tensor, x: torch.Tensor, norm: torch.Tensor) -> StaleErrors:
        """Returns the errors of the kept outputs against x [B, N, D], whose tokens have the lengths `norm` [B, N].

        1 − cos = (|a − b|² − (|a| − |b|)²) / (2 |a| |b|), which has no cancellation for nearly equal vectors.
        E_p by the row-exact identity: a pruned module returns the kept tokens exactly, so
        E_p(rate) = (1/N) Σ over the dropped tokens of 1 − cos.
        """
        known = min(self.step, self.ages)
        slots = [(self.step - age) % self.ages for age in range(1, known + 1)]
        parts = (outputs, self.norms, self.order, self.scratch[outputs.shape])
        past, past_norm, order, scratch = (part[:, :, :known] for part in parts)
        difference = torch.sub(past, x[:, :, None], out=scratch)
        l2 = torch.linalg.vector_norm(difference, dim=-1)  # [B, N, A]
        l1 = difference.abs_().sum(-1)  # in place: vector_norm(ord=1) takes ten times as long on a CPU
        both = norm[:, :, None] * past_norm
        cosine = ((l2.square() - (norm[:, :, None] - past_norm).square()) / (2 * both).clamp_min(TINY)).clamp_min(0)
        whole = torch.stack(
            [
                cosine.mean(1),
                l1.sum(1) / x.abs().sum((1, 2))[:, None].clamp_min(TINY),
                l2.square().sum(1).sqrt() / norm.square().sum(1).sqrt()[:, None].clamp_min(TINY),
            ],
            dim=-1,
        )
        ranked = cosine.gather(1, order)
        of_kept = torch.cat([torch.zeros_like(ranked[:, :1]), ranked.cumsum(1)], dim=1)  # [B, N + 1, A]: of the first k
        pruned = ((of_kept[:, -1:] - of_kept[:, self.kept]) / x.shape[1]).clamp_min(0).transpose(1, 2)
        return StaleErrors(whole[:, slots], cosine.sum(0)[:, slots], pruned[:, slots])


def kept_tokens(rates: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns how many of N tokens each prune rate recomputes, int64."""
    return ((1 - rates.double()) * tokens).round().long()


def pooled(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns errors [N, A] of a raster's tokens as their means [M, A] on the grid."""
    if grid.side == 1:
        return tokens
    raster = tokens.T.reshape(-1, 1, grid.rows, grid.columns)  # [A · frames, 1, rows, columns]
    side = (min(grid.side, grid.rows), grid.side)
    return F.avg_pool2d(raster, side, ceil_mode=True).reshape(tokens.shape[1], -1).T
