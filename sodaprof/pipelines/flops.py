"""Counts FLOPs per site and action on the meta device: no weights, no arithmetic, a multiply-add is 2.

A model that cannot run there, because it reads values of its tensors, is counted while it runs on its own device. Matrix
products, convolutions and attention count, and the sums of forecasts; elementwise operations do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import UnsupportedModelError
from ..formats.cost import CostModel, SiteCost, StepCost, TransformerCost
from ..formats.rules import OBSERVED
from ..formats.sites import Model, Site
from .attention import record_attention
from .probe import Args, Forward, Kwargs, main_part, with_rows
from .recording import Step, all_tapped

SOURCES = 4


def count_flops(pipe: Any, model: Model, step: Step) -> CostModel:
    """Returns the cost table of one generation (both guidance branches) at the shapes of the recorded step.

    Raises UnsupportedModelError if torch counts no FLOPs for a site's operators, or cannot count at all.
    """
    transformers = {}
    for name in model.transformers:
        calls = [(args, kwargs) for n, args, kwargs in step.calls if n == name]
        sites, transformer = model.transformers[name].sites, pipe.components[name]
        try:
            on_meta = tree_map(lambda x: x.to("meta") if torch.is_tensor(x) else x, calls)
            transformers[name] = _count(_meta_copy(transformer), sites, on_meta)
        except Exception:  # each operator that needs values has an error of its own; the run below repeats any other
            try:
                transformers[name] = _count(transformer, sites, calls)
            except Exception as error:
                raise UnsupportedModelError(
                    f"{type(transformer).__name__}: its FLOPs cannot be counted ({type(error).__name__}: {error})."
                ) from error
        if idle := [key for key, cost in transformers[name].sites.items() if not cost.C > 0]:
            raise UnsupportedModelError(
                f"{type(transformer).__name__}: torch counts no FLOPs for {idle[0]} ({len(idle)} sites), so no budget can be "
                "met."
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


def _meta_copy(transformer: Any) -> torch.nn.Module:
    """Returns a copy of the transformer on the meta device, made from its configuration."""
    with torch.device("meta"):
        copy = type(transformer).from_config(transformer.config)
    return torch.nn.Module.to(copy, device="meta", dtype=transformer.dtype).eval()


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _counter() -> FlopCounterMode:
    """Returns torch's counter with the attention of CPUs added, which it lacks."""
    added = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    return FlopCounterMode(display=False, custom_mapping=added)


@contextmanager
def _frozen(module: torch.nn.Module) -> Iterator[None]:
    """Turns gradients off while the block runs: torch's counter fails on a parameter that is passed to a submodule."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _SiteCounter:
    """Counts the FLOPs of sites and blocks while a transformer runs, and of the sites' pruned calls in addition."""

    def __init__(self, counter: FlopCounterMode, sites: tuple[Site, ...]) -> None:
        self.counter, self.sites = counter, {site.key: site for site in sites}
        self.full: Counter[str] = Counter()
        self.pruned: Counter[str] = Counter()  # with one token
        self.maps: Counter[str] = Counter()  # attention weights alone
        self.elements: Counter[str] = Counter()  # of the outputs
        self.calls: Counter[str] = Counter()  # of each module in the network call
        self.blocks = 0
        self._trials = 0  # of the pruned calls, which the counter includes

    @property
    def total(self) -> int:
        """FLOPs of the network so far, without the pruned calls."""
        return int(self.counter.get_total_flops()) - self._trials

    def site(self, path: str, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        key = path + (f"#{self.calls[path]}" if self.calls[path] else "")
        site = self.sites[key]
        self.calls[path] += 1
        before = self.total
        out, attention = record_attention(forward, args, kwargs)
        self.full[key] += self.total - before
        first = main_part(out)
        self.elements[key] += first.numel()
        if site.prunable:
            one = torch.zeros(first.shape[0], 1, dtype=torch.int64, device=first.device)
            some_args, some_kwargs = with_rows(site.kind.endswith("attn"), args, kwargs, one)
            with _counter() as single:
                forward(*some_args, **some_kwargs)
            self.pruned[key] += single.get_total_flops()
            self._trials += single.get_total_flops()
        if site.kind in OBSERVED.values():
            self.maps[key] += sum(2 * call.q.numel() * call.k.shape[2] for call in attention)
        return out

    def block(self, path: str, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
        before = self.total
        out = forward(*args, **kwargs)
        self.blocks += self.total - before
        return out


def _count(network: Any, sites: tuple[Site, ...], calls: list[tuple[Args, Kwargs]]) -> TransformerCost:
    paths = {site.path for site in sites}
    stacks = dict.fromkeys(site.stack for site in sites)
    blocks = [f"{stack}.{layer}" for stack in stacks for layer in range(len(getattr(network, stack)))]
    with torch.no_grad(), _frozen(network), _counter() as counter:
        found = _SiteCounter(counter, sites)
        in_sites = all_tapped(network, paths, found.site, "sodaprof.count")
        with in_sites, all_tapped(network, blocks, found.block, "sodaprof.count"):
            for args, kwargs in calls:
                found.calls.clear()
                network(*args, **kwargs)
        total = found.total
    costs = {}
    for site in sites:
        full = float(found.full[site.key])
        points = ((1, float(found.pruned[site.key])), (site.tokens, full)) if site.prunable else ((site.tokens, full),)
        forecasts = tuple(2.0 * k * found.elements[site.key] for k in range(1, SOURCES + 1))
        costs[site.key] = SiteCost(full, 0.0, forecasts, points, float(found.maps[site.key]))
    fixed, outside_blocks = float(total - sum(found.full.values())), float(total - found.blocks)
    last_hidden = found.elements[sites[-1].key]
    forecast = tuple(outside_blocks + 2.0 * k * last_hidden for k in range(1, SOURCES + 1))
    return TransformerCost(StepCost(fixed, fixed, forecast), costs)
