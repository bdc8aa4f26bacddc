"""A cached sum in one launch: start + sum of gate * weighted sum of kept outputs, all read from one arena.

The sums of `sums` for a GPU: each element of the stream is read once, and the loop over the kept outputs runs inside the
kernel. The terms are a table on the device, so one kernel serves all sums, and a CUDA graph can hold the launch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from ...errors import UnsupportedModelError

tl: Any = None  # triton.language after _compiled(): Triton reads the names in a kernel from the module of the kernel

TILE = 1024  # elements of the stream that a program adds up: 8 a thread


class Plan(NamedTuple):
    """The terms of a sum as the kernel reads them: a row for every source, in the order of addition."""

    sources: torch.Tensor  # int32 [sources, 4]: slot of the arena, first of a term?, last of it?, row of its gate or -1
    weights: torch.Tensor  # fp32 [sources]; 1 for a source that is not weighted, which changes no bit
    slots: int  # least number of slots in the arena
    terms: int
    plain: bool  # each term is one source, not weighted: such a sum needs fewer roundings


def available() -> bool:
    """Returns whether Triton is installed. Without a GPU it runs only with TRITON_INTERPRET=1, for tests."""
    return find_spec("triton") is not None


def plan_of(terms: Sequence[tuple[Sequence[tuple[int, float | None]], bool]], device: torch.device | str) -> Plan:
    """Returns the plan of a sum, on `device`.

    terms: (sources, gated?) of each, in order; a source is (slot of the arena, weight; None: not weighted).
    """
    rows, weights = list[tuple[int, int, int, int]](), list[float]()
    for number, (sources, gated) in enumerate(terms):
        for i, (slot, weight) in enumerate(sources):
            rows.append((slot, i == 0, i == len(sources) - 1, number if gated else -1))
            weights.append(1.0 if weight is None else weight)
    plain = all(len(sources) == 1 and sources[0][1] is None for sources, _ in terms)
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)
    slots = max((row[0] for row in rows), default=-1) + 1
    return Plan(table.to(device), torch.tensor(weights, dtype=torch.float32).to(device), slots, len(terms), plain)


def sum_kept(
    start: torch.Tensor,
    arena: torch.Tensor,
    plan: Plan,
    gates: torch.Tensor,
    ordered: bool,
) -> torch.Tensor:
    """Returns start + sum of gate * weighted sum of slots.

    ordered: with the bits of torch's own operators one by one; else fused, in fp32 and rounded once.

    start: [B, N, D]; arena: [slots, B, N, D]; gates: [terms, B, D], rows of terms without a gate are not read; all
    contiguous, on one GPU, of one dtype: fp32, bf16 or fp16. There is no host sync. The first call for a dtype, for ordered
    or not, and for a plain plan or not compiles a kernel: make it before a graph is captured.
    """
    kernel, (batch, tokens, width) = _compiled(), start.shape
    out, tensors = torch.empty_like(start), (start, arena, gates)
    if (
        start.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or any(t.dtype != start.dtype or t.device != start.device or not t.is_contiguous() for t in tensors)
        or plan.sources.device != start.device
        or arena.shape[1:] != start.shape
        or arena.shape[0] < plan.slots
        or gates.shape != (plan.terms, batch, width)
    ):
        shapes = ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors)
        raise ValueError(
            f"start, arena and gates are {shapes}, for {plan.terms} terms from {plan.slots} slots on {plan.sources.device}; "
            "expected: [B, N, D], [slots, B, N, D] and [terms, B, D], contiguous, of one dtype (fp32, bf16 or fp16), on the "
            "device of the plan."
        )
    cols = min(128, 1 << (width - 1).bit_length())
    rows = TILE // cols
    grid = (-(-width // cols), -(-tokens // rows), batch)
    rounding = str(start.dtype if ordered else torch.float32).removeprefix("torch.")
    with torch.cuda.device_of(start):  # Triton launches on the current device
        # Ordered: a multiplication and the addition that takes its result must not become one FMA, which rounds once while
        # torch's kernels round twice. A cast between the two does not prevent it: LLVM computes in bf16 or fp16 if that gives
        # the same bits, and fuses there. enable_fp_fusion is Triton's launch option for it: it goes to LLVM and to ptxas
        # (--fmad=false) and precedes TRITON_DEFAULT_FP_FUSION; Inductor passes it to give the bits of eager mode.
        # libdevice.mul_rn and inline PTX exist on NVIDIA GPUs only, and the interpreter runs neither.
        kernel[grid](
            start, arena, gates, plan.sources, plan.weights, out, len(plan.sources), tokens, width, start.numel(),
            PLAIN=plan.plain, ROWS=rows, COLS=cols, ROUNDING=getattr(tl, rounding), num_warps=4, enable_fp_fusion=not ordered,
        )  # fmt: skip
    return out


@lru_cache(maxsize=1)
def _compiled() -> Any:
    global tl
    if not available():
        raise UnsupportedModelError(
            "Triton is not installed; the kernel for cached sums is written in it, and it comes with torch for CUDA on Linux. "
            "Install it (pip install triton), or run without this kernel."
        )
    tl = importlib.import_module("triton.language")
    # numbers that vary from sum to sum: a kernel specialized for them would compile within a generation, or a capture
    return importlib.import_module("triton").jit(_sum, do_not_specialize=["sources", "tokens"])


def _sum(  # type: ignore[no-untyped-def]
    start, arena, gates, table, weights, out, sources, tokens, width, size,
    PLAIN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < tokens)[:, None] & (col < width)
    element = (batch.to(tl.int64) * tokens + row)[:, None] * width + col  # an arena may have more than 2^31 elements
    # read once for each row, from the L1 cache: no exchange between threads
    across = tl.broadcast_to(col, [ROWS, COLS])
    total = tl.load(start + element, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros([ROWS, COLS], dtype=tl.float32)
    # no branches, and an unrolled loop: the loads of one iteration need not wait for the sum of another
    for i in tl.range(0, sources, loop_unroll_factor=4):
        slot = tl.load(table + 4 * i).to(tl.int64)
        row_of_gate = tl.load(table + 4 * i + 3).to(tl.int64)
        kept = tl.load(arena + slot * size + element, mask=inside, other=0.0).to(tl.float32)
        if PLAIN:
            part = kept
        else:
            weighted = (kept * tl.load(weights + i)).to(ROUNDING).to(tl.float32)
            sum_so_far = (part + weighted).to(ROUNDING).to(tl.float32)
            part = tl.where(tl.load(table + 4 * i + 1) != 0, weighted, sum_so_far)
        gate_at = gates + (row_of_gate * tl.num_programs(2) + batch) * width + across
        gate = tl.load(gate_at, mask=across < tl.where(row_of_gate < 0, 0, width), other=1.0).to(tl.float32)
        term = (gate * part).to(ROUNDING).to(tl.float32)
        added = (total + term).to(ROUNDING).to(tl.float32)
        total = added if PLAIN else tl.where(tl.load(table + 4 * i + 2) != 0, added, total)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)
