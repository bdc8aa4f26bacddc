"""Counts FLOPs per site and action on the meta device: no weights, no arithmetic, a multiply-add is 2.

A model that cannot run there, because it looks at its data, is counted while it runs on its own device.

Matrix products, convolutions and attention count, and the sums of forecasts; elementwise work does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import UnsupportedModelError
from ..formats.cost import CostModel, SiteCost, StepCost, TransformerCost
from ..formats.rules import OBSERVED
from ..formats.sites import Model, Site
from .attention import listen
from .probe import main_part, with_rows
from .recording import Step, tapped
from .structure import find_modules

SOURCES = 4


def count_flops(pipe: Any, model: Model, step: Step) -> CostModel:
    """Returns the cost table of one generation (both guidance branches) at the shapes of the recorded step.

    Raises UnsupportedModelError where torch knows no FLOPs of a site's operators, or cannot count at all.
    """
    transformers = {}
    for name in model.transformers:
        calls = [(args, kwargs) for n, args, kwargs in step.calls if n == name]
        sites, transformer = model.transformers[name].sites, pipe.components[name]
        try:
            to_meta = lambda x: x.to("meta") if torch.is_tensor(x) else x  # noqa: E731
            transformers[name] = _count(on_meta(transformer), sites, tree_map(to_meta, calls))
        except Exception:  # each operator that needs data has an error of its own; the run below repeats any other
            try:
                transformers[name] = _count(transformer, sites, calls)
            except Exception as error:
                raise UnsupportedModelError(
                    f"{type(transformer).__name__}: its FLOPs cannot be counted ({type(error).__name__}: {error})."
                ) from error
        if idle := [key for key, cost in transformers[name].sites.items() if not cost.C > 0]:
            raise UnsupportedModelError(
                f"{type(transformer).__name__}: torch knows no FLOPs of {idle[0]} ({len(idle)} sites), so no budget can "
                "be kept."
            )
    return CostModel(
        unit="flops",
        device="meta",
        dtype=model.shape["dtype"],
        batch=1,
        tokens=model.shape["tokens"],
        transformers=transformers,
        loop={"scheduler": 0.0, "update": 0.0, "guidance": 0.0},
        outside={"text_encoder": None, "vae": None},
    )


def on_meta(transformer: Any) -> torch.nn.Module:
    """Returns a copy of the transformer on the meta device, made from its configuration."""
    with torch.device("meta"):
        copy = type(transformer).from_config(transformer.config)
    return torch.nn.Module.to(copy, device="meta", dtype=transformer.dtype).eval()


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _counter() -> FlopCounterMode:
    """Returns torch's counter, which does not know the attention of CPUs, with that added."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    )


@contextmanager
def _frozen(module: torch.nn.Module) -> Iterator[None]:
    """No parameter asks for gradients while the block runs: torch's counter stumbles over one handed to a submodule."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _count(shell: Any, sites: tuple[Site, ...], calls: list[tuple[Any, Any]]) -> TransformerCost:
    found = find_modules(shell)
    by_key = {site.key: site for site in sites}
    full: dict[str, float] = {}
    pruned: dict[str, float] = {}
    maps: dict[str, float] = {}
    numbers: dict[str, int] = {}
    index: dict[str, int] = {}
    trials = 0.0  # what trying the pruned calls cost: the outer counter sees them too

    def tap(path: str) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal trials
            call = index[path] = index.get(path, -1) + 1
            key = path + (f"#{call}" if call else "")
            before = counter.get_total_flops()
            out, heard = listen(forward, args, kwargs)
            full[key] = full.get(key, 0.0) + counter.get_total_flops() - before
            first = main_part(out)
            numbers[key] = numbers.get(key, 0) + first.numel()
            if by_key[key].prunable:
                one = torch.zeros(first.shape[0], 1, dtype=torch.int64, device=first.device)
                rows = with_rows(by_key[key].kind.endswith("attn"), args, kwargs, one)
                with _counter() as single:
                    forward(*rows[0], **rows[1])
                pruned[key] = pruned.get(key, 0.0) + single.get_total_flops()
                trials += single.get_total_flops()
            if by_key[key].kind in OBSERVED.values():
                maps[key] = maps.get(key, 0.0) + sum(h.map_flops() for h in heard)
            return out

        return run

    blocks_flops = 0.0

    def block_tap(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal blocks_flops
        before = counter.get_total_flops() - trials
        out = forward(*args, **kwargs)
        blocks_flops += counter.get_total_flops() - trials - before
        return out

    paths = {site.path for site in sites}
    stacks = {site.stack for site in sites}
    with torch.no_grad(), _frozen(shell), ExitStack() as stack, _counter() as counter:
        for path in paths:
            stack.enter_context(tapped(found[path][4], tap(path), "sodaprof.count"))
        for name in stacks:
            for block in getattr(shell, name):
                stack.enter_context(tapped(block, block_tap, "sodaprof.count"))
        for args, kwargs in calls:
            index.clear()
            shell(*args, **kwargs)
        total = counter.get_total_flops() - trials
    last_hidden = numbers[sites[-1].key]
    costs = {}
    for site in sites:
        c, n = float(full[site.key]), site.tokens
        points = ((1, float(pruned[site.key])), (n, c)) if site.prunable else ((n, c),)
        forecasts = tuple(2.0 * k * numbers[site.key] for k in range(1, SOURCES + 1))
        costs[site.key] = SiteCost(c, 0.0, forecasts, points, maps.get(site.key, 0.0))
    fixed = total - sum(full.values())
    outside_blocks = float(total - blocks_flops)
    forecast = tuple(outside_blocks + 2.0 * k * last_hidden for k in range(1, SOURCES + 1))
    return TransformerCost(StepCost(float(fixed), float(fixed), forecast), costs)
