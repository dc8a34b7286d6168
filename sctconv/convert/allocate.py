"""Ranks by measurement: what each layer's truncation costs at the model's end, and a knapsack over all layers.

As LEMS (ICML 2026) does: every layer alone is truncated at a reference rank and the KL from the dense model to the one so
changed is measured at the end of the model; other ranks follow by the layer's whitened tail, as the harm of a small change
grows with its square; `harm(k) = weight(depth) KL tail(k) / tail(reference)`. What a layer does alone is not what it does
in company: a sweep repairs in later blocks what earlier ones lose, the last ones have nobody behind them. So the weight of
depth, `exp(slope (b - 1/2))` for b from 0 (first block) to 1 (last), and the power to which the measured KL counts are
chosen by short sweeps with the ranks they lead to, by their KL on held-out text; uniform ranks run along, so that what is
returned was never seen to be worse than they are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sctconv.errors import OptionError
from sctconv.runtime.linalg import singular_values

from .blocks import Block, tapped
from .budget import MemoryPlan
from .calibration import Calibration
from .decoder import Decoder
from .fit import Moments, Root, closed_form
from .metric import Metric
from .plan import LayerPlan, Plan
from .states import States
from .student import replace_
from .sweep import Sweep

_WINDOWS: Final = 2
"""Windows on which each layer's own KL is measured."""

TRIAL_TOKENS: Final = 8192
"""Tokens that the short sweeps fit on."""

_SLOPE: Final = 1.5
_POWERS: Final = (0.5, 1.0)
"""Tried are both powers without slope, the slopes of either sign with the better power, and a last slope between the two
best."""

TRIALS: Final = len(_POWERS) + 4
"""How many short sweeps there are, with uniform ranks."""

_FLOOR: Final = 0.25
"""No layer gets less than this share of the rank that it would have if all were treated alike."""

_STEPS: Final = 64
"""Steps of rank between nothing and all of a layer."""

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Sensitivity:
    """What truncating one layer does.

    Attributes:
        kl: from the dense model to the one with this layer alone truncated at `rank`, nats a token.
        rank: the reference rank.
        tail: (min(m, n) + 1,) float64; entry k is the energy of the outputs, by their metric, that rank k loses.
        depth: of its block, 0 to 1.
    """

    kl: float
    rank: int
    tail: Tensor
    depth: float

    def harm(self, slope: float, power: float) -> Tensor:
        """Expected harm at every rank, (min(m, n) + 1,)."""
        weight = torch.tensor(slope * (self.depth - 0.5), dtype=torch.float64).exp()
        reference = float(self.tail[self.rank])
        return self.tail * (weight * max(self.kl, 1e-9) ** power / reference) if reference else self.tail


@dataclass(frozen=True)
class _Trial:
    kl: float
    slope: float
    power: float
    ranks: dict[str, int | None]


def allocate(
    decoder: Decoder,
    plan: Plan,
    texts: Calibration,
    memory: MemoryPlan,
    metrics: Mapping[str, Metric],
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, int | None], dict[str, Any]]:
    """Distributes the parameters that a plan gives to its factored layers by what they are worth.

    Args:
        decoder: the dense checkpoint.
        plan: says which layers, how many parameters in all, and the reference ranks.
        texts: calibration windows.
        memory: how much may be held at once.
        metrics: layer -> what errors of its outputs cost.
        progress: called with the share of the work done and a word on it.

    Returns:
        Each layer's rank, see `with_ranks`, and what led to them, for the file's index.

    Raises:
        OptionError: the memory is too small for it.
    """
    layers = {layer.name: layer for layer in plan.layers.values() if layer.reason is None and layer.rank}
    inside = {name: layers[name] for name in decoder.layers}
    widest = max(layer.in_ for layer in inside.values())
    if widest > memory.gram_side:
        raise OptionError(f"--allocate measured: needs Gram matrices of {widest} x {widest}; allow more --max-memory")
    report = progress or (lambda share, what: None)
    whole = 1.0 + TRIALS  # measuring counts as one sweep
    sensitivities = measure(
        decoder, inside, texts, memory, metrics, progress=lambda share, what: report(share / whole, what)
    )
    budget = sum(layer.parameters for layer in inside.values())
    count = max(1, TRIAL_TOKENS // texts.context)
    few = replace(texts, fit=texts.fit[:count], held_out=texts.held_out[: max(1, count // 2)])
    trials: list[_Trial] = []

    def attempt(ranks: dict[str, int | None], slope: float = 0.0, power: float = 0.0) -> _Trial:
        start = (1.0 + len(trials)) / whole
        told = {name: rank for name, rank in ranks.items() if rank is not None}
        stage = lambda share, what: report(start + share / whole, f"trial {len(trials) + 1} of {TRIALS}, {what}")  # noqa: E731
        sweep = Sweep(decoder, told, few, memory, metrics=metrics, progress=stage)
        for _ in sweep.run():
            pass
        trials.append(_Trial(sweep.result.kl, slope, power, ranks))
        return trials[-1]

    def measured(slope: float, power: float) -> _Trial:
        return attempt(knapsack(inside, sensitivities, budget, slope, power), slope, power)

    uniform = attempt({name: layer.rank for name, layer in inside.items()})
    flat = min((measured(0.0, power) for power in _POWERS), key=lambda trial: trial.kl)
    near = sorted([flat, *(measured(slope, flat.power) for slope in (-_SLOPE, _SLOPE))], key=lambda trial: trial.kl)
    measured((near[0].slope + near[1].slope) / 2, flat.power)
    best = min(trials, key=lambda trial: trial.kl)
    facts = {
        "trials": [
            {"kl": trial.kl, **({} if trial is uniform else {"slope": trial.slope, "power": trial.power})}
            for trial in trials
        ],
        "layer_kl": {name: sensitivity.kl for name, sensitivity in sensitivities.items()},
    }
    return best.ranks, facts


def measure(
    decoder: Decoder,
    layers: Mapping[str, LayerPlan],
    texts: Calibration,
    memory: MemoryPlan,
    metrics: Mapping[str, Metric],
    *,
    progress: Progress,
) -> dict[str, Sensitivity]:
    """Each layer's sensitivity at its planned rank, in one pass through the model, one dense block in memory at a time.

    The hidden states of all variants of the model travel along; a layer that is not run once on all tokens is left out.
    """
    batch = min(memory.batch, _WINDOWS)
    windows = texts.fit[: max(_WINDOWS, TRIAL_TOKENS // texts.context)]
    windows = windows[: max(1, len(windows) // batch) * batch]
    batches = list(windows.split(min(batch, len(windows))))
    measured = batches[: max(1, _WINDOWS // batch)]
    dense = States.of(decoder.embed(batches), len(batches), memory.spill)
    variants: dict[str, States] = {}
    tails: dict[str, tuple[int, Tensor, float]] = {}
    with torch.no_grad():
        for place in range(len(decoder)):
            block = decoder.block(place, dense[0])
            for states in variants.values():
                for number in range(len(measured)):
                    states[number] = block.run(states[number].to(decoder.device))
            for name, K, yy in _inputs(block, dense, set(layers)):
                path = f"{block.name}.{name}"
                W, rank = block.weight(name), layers[path].rank
                assert rank is not None
                root = Root.of(K)
                metric = metrics.get(path)
                outputs = W.double() @ root.L
                energy = singular_values(metric.apply_(outputs) if metric else outputs).square()
                tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
                tails[path] = rank, tail, place / max(1, len(decoder) - 1)
                fit = closed_form(Moments(K, K, yy, 1, W=W), rank, prior=W, root=root, metric=metric)
                kept = block.module.get_submodule(name)
                replace_(block.module, name, fit)
                changed = (block.run(dense[number].to(decoder.device)) for number in range(len(measured)))
                variants[path] = States.of(changed, len(measured), memory.spill)
                _put(block.module, name, kept)
            for number, state in enumerate(dense):
                dense[number] = block.run(state.to(decoder.device))
            progress(((place + 1) / len(decoder)) ** 2, "measuring layers")
            del block  # before the next is loaded
    kls = _kls(decoder, list(dense)[: len(measured)], variants, measured)
    return {name: Sensitivity(kls[name], rank, tail, depth) for name, (rank, tail, depth) in tails.items()}


def knapsack(
    layers: Mapping[str, LayerPlan],
    sensitivities: Mapping[str, Sensitivity],
    budget: int,
    slope: float,
    power: float,
) -> dict[str, int | None]:
    """The ranks with the least harm in all within a budget of parameters; None for a layer that stays dense.

    Harm falls convexly with the rank, so taking the step that saves most per parameter, again and again, is optimal up to
    one step. Every layer starts at its floor.

    Args:
        layers: layer -> its plan, whose rank is what it would get if all were treated alike.
        sensitivities: of the same layers; one that is not among them keeps its rank.
        budget: parameters of all layers together.
        slope, power: see the module.
    """
    ranks: dict[str, int | None] = {}
    left = budget
    heap: list[tuple[float, str, int | None, int]] = []
    harms = {name: sensitivity.harm(slope, power) for name, sensitivity in sensitivities.items()}

    def push(name: str) -> None:
        layer, rank = layers[name], ranks[name]
        if rank is None:
            return
        per_rank = layer.out + layer.in_ + 1
        following = rank + max(1, min(layer.out, layer.in_) // _STEPS)
        harm = harms[name]
        if following <= layer.largest_useful_rank:
            cost, saved = (following - rank) * per_rank, float(harm[rank] - harm[following])
            heapq.heappush(heap, (-saved / cost, name, following, cost))
        else:
            cost = layer.out * layer.in_ - rank * per_rank
            heapq.heappush(heap, (-float(harm[rank]) / cost, name, None, cost))

    for name, layer in layers.items():
        assert layer.rank is not None
        ranks[name] = max(1, int(_FLOOR * layer.rank)) if name in harms else layer.rank
        left -= (ranks[name] or 0) * (layer.out + layer.in_ + 1)
    for name in harms:
        push(name)
    while heap:
        _, name, rank, cost = heapq.heappop(heap)
        if cost <= left:
            ranks[name], left = rank, left - cost
            push(name)
    return ranks


def _inputs(block: Block, states: States, wanted: set[str]) -> Iterator[tuple[str, Tensor, float]]:
    """Each layer of a dense block with the K (n, n) float64 of its inputs and the energy of its outputs."""
    groups = [[name for name in group if f"{block.name}.{name}" in wanted] for group in block.groups]
    groups = [group for group in groups if group]
    K: dict[str, Tensor] = {}
    energy: dict[str, float] = {}
    with tapped(block.module, [group[0] for group in groups], [name for group in groups for name in group]) as taps:
        for state in states:
            block.run(state.to(next(block.module.parameters()).device))
            for name, x in taps.inputs.items():
                x = x.flatten(0, -2)
                K[name] = K[name].add_(x.T @ x) if name in K else (x.T @ x).double()
            for name, y in taps.outputs.items():
                energy[name] = energy.get(name, 0.0) + float(y.double().square().sum())
    for group in groups:
        for name in group:
            yield name, K[group[0]], energy[name]


def _kls(
    decoder: Decoder, dense: Sequence[Tensor], variants: Mapping[str, States], batches: Sequence[Tensor]
) -> dict[str, float]:
    """Mean KL(dense || variant) of the next-token distributions, in nats."""
    parts = decoder.parts(len(batches[0]), batches[0].shape[1])
    sides = [dense, *variants.values()]
    read = ([side[number] for side in sides] for number in range(len(batches)))  # once each: they may be on the disk
    states = (state[:, part] for together in read for part in parts for state in together)
    tokens = [batch[:, part] for batch in batches for part in parts]
    logits = decoder.head(states, [part for part in tokens for _ in sides])
    kls = dict.fromkeys(variants, 0.0)
    for _ in tokens:
        target = F.log_softmax(next(logits), -1)
        for name in variants:
            log = F.log_softmax(next(logits), -1)
            kls[name] += float(F.kl_div(log, target, reduction="sum", log_target=True))
    return {name: total / sum(batch.numel() for batch in batches) for name, total in kls.items()}


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)


def with_ranks(plan: Plan, ranks: Mapping[str, int | None]) -> Plan:
    """A plan with each layer's rank, None for one that stays dense."""
    layers = {}
    for weight, layer in plan.layers.items():
        if layer.name in ranks:
            rank = ranks[layer.name]
            layer = replace(layer, rank=rank, reason=None if rank else "worth more dense than what it would save")
        layers[weight] = layer
    return replace(plan, layers=layers)
