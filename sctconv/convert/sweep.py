"""The sweep: block by block in forward order, teacher and student side by side.

Each layer is fitted on the inputs that it will really get (the student's) to the outputs that it should give (the
teacher's). Layers that write to the residual stream aim further: at the teacher's stream less what the student's already
has, so every block also repairs what the blocks before it have lost. One sweep; repeating it was measured to be worse.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sctconv.runtime.spectral import SpectralLinear

from .blocks import Block, Decoder, Writer, hooked, tapped
from .calibration import Calibration
from .fit import Fit, Moments, closed_form


@dataclass
class SweepResult:
    """What the held-out windows say after the last block.

    Attributes:
        distances: per block, |student - teacher| / |teacher| of the hidden states after it, over held-out tokens.
        perplexity, teacher_perplexity: on the held-out windows.
        kl: mean KL(teacher || student) of the next-token distributions there, in nats.
    """

    distances: list[float] = field(default_factory=list)
    perplexity: float = math.nan
    teacher_perplexity: float = math.nan
    kl: float = math.nan


class Sweep:
    """Fits the factors of all layers of a decoder.

    Args:
        decoder: the dense checkpoint.
        ranks: layer -> rank.
        calibration: windows to fit on and to measure on.
        batch: windows that are run at once.
        progress: called after each batch with the share of the work that is done and a word on what is being done.
    """

    def __init__(
        self,
        decoder: Decoder,
        ranks: Mapping[str, int],
        calibration: Calibration,
        *,
        batch: int = 4,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self._decoder = decoder
        self._ranks = ranks
        self._progress = progress
        windows = torch.cat([calibration.held_out, calibration.fit])
        is_fit = torch.arange(len(windows)) >= len(calibration.held_out)
        batch = min(batch, len(windows))
        count = len(windows) // batch * batch  # one shape for all batches; the rest, less than a batch, is left out
        self._batches = windows[:count].reshape(-1, batch, windows.shape[1])
        self._is_fit = is_fit[:count].reshape(-1, batch)
        self._done, self._passes = 0.0, 1
        self.result = SweepResult()

    @torch.no_grad()
    def run(self) -> Iterator[tuple[str, dict[str, Fit]]]:
        """Yields each block's path and the fits of its layers, by their path in the model."""
        teacher = self._decoder.embed(list(self._batches))
        student = list(teacher)
        for place in range(len(self._decoder)):
            block = self._decoder.block(place, teacher[0])
            self._done, self._passes = place, 2 + len(block.groups)
            seen = self._teach(block, teacher)
            module, fits = block.student(), {}
            for group in block.groups:
                for name, fit in self._fit_group(block, module, group, student, seen).items():
                    fits[f"{block.name}.{name}"] = fit
                    _replace(module, name, fit)
            student = [self._step(block, module, state) for state in student]
            self.result.distances.append(self._distance(teacher, student))
            yield block.name, fits
        self._measure(teacher, student)

    def _report(self, what: str) -> None:
        """One batch of one pass through a block is done; blocks count alike."""
        self._done += 1.0 / (self._passes * len(self._batches))
        if self._progress:
            self._progress(min(1.0, self._done / len(self._decoder)), what)

    def _step(self, block: Block, module: nn.Module, state: Tensor) -> Tensor:
        self._report(block.name)
        return block.run(state, module)

    def _teach(self, block: Block, states: list[Tensor]) -> _Teacher:
        """Runs the dense block on the teacher's states, in place, and keeps what the student's layers aim at."""
        seen = _Teacher()
        plain = {name for group in block.groups for name in group} - set(block.writers)
        firsts = {group[0] for group in block.groups if plain.intersection(group)}
        places = {writer.place for writer in block.writers.values()} - {""}
        with tapped(block.module, firsts | places, plain) as taps:
            for number, state in enumerate(states):
                states[number] = block.run(state)
                self._report(block.name)
                for name, x in taps.inputs.items():
                    seen.inputs.setdefault(name, []).append(x)
                for name, y in taps.outputs.items():
                    energy = float(y[self._is_fit[number]].double().square().sum())
                    seen.yy[name] = seen.yy.get(name, 0.0) + energy
        seen.inputs[""] = states
        return seen

    def _fit_group(
        self, block: Block, module: nn.Module, group: list[str], states: list[Tensor], seen: _Teacher
    ) -> dict[str, Fit]:
        plain = [name for name in group if name not in block.writers]
        writers = {name: block.writers[name] for name in group if name in block.writers}
        sums = {name: _Sums() for name in group}
        cross = _Sums()
        for number, state in enumerate(states):
            self._report(block.name)
            rows = self._is_fit[number]
            x, outputs, streams = _run_student(block, module, group, writers, state)
            x = _flat(x[rows])
            K = x.T @ x
            if plain:
                t = _flat(seen.inputs[group[0]][number][rows])
                cross.add(K, t.T @ x, x, t)
            for name, writer in writers.items():
                z = seen.inputs[writer.place][number]
                y = (z - streams[writer.place]) / writer.scale + outputs[name]
                y = _flat(y[rows])
                sums[name].add(K, y.T @ x, x, y)
                sums[name].yy += float(y.double().square().sum())
        fits = {}
        for name in group:
            layer: Any = block.module.get_submodule(name)
            W = (layer.weight if isinstance(layer, nn.Linear) else layer.weight.T).double()
            bias = layer.bias.double() if layer.bias is not None else None
            moments = sums[name].moments(bias) if name in writers else cross.through(W, bias, seen.yy[name])
            fits[name] = closed_form(moments, self._ranks[f"{block.name}.{name}"], prior=W)
        return fits

    def _distance(self, teacher: list[Tensor], student: list[Tensor]) -> float:
        difference = norm = 0.0
        for t, s, is_fit in zip(teacher, student, self._is_fit, strict=True):
            t, s = t[~is_fit], s[~is_fit]
            difference += float((t - s).double().square().sum())
            norm += float(t.double().square().sum())
        return math.sqrt(difference / norm) if norm else math.nan

    def _measure(self, teacher: list[Tensor], student: list[Tensor]) -> None:
        """Perplexity and KL on the held-out windows, one at a time: logits are the largest thing in the whole sweep."""
        held_out = ~self._is_fit
        windows = list(self._batches[held_out].unsqueeze(1))
        states = [
            [row[None] for state, keep in zip(side, held_out, strict=True) for row in state[keep]]
            for side in (teacher, student)
        ]
        heads = zip(*(self._decoder.head(side, windows) for side in states), strict=True)
        nll, kl, tokens = [0.0, 0.0], 0.0, 0
        for window, pair in zip(windows, heads, strict=True):
            target = window[0, 1:]
            logs = [F.log_softmax(logits[0, :-1], -1) for logits in pair]
            for place, log in enumerate(logs):
                nll[place] += float(F.nll_loss(log, target, reduction="sum"))
            kl += float(F.kl_div(logs[1], logs[0], reduction="sum", log_target=True))
            tokens += target.numel()
        self.result.teacher_perplexity, self.result.perplexity = (math.exp(min(value / tokens, 700)) for value in nll)
        self.result.kl = kl / tokens


@dataclass
class _Teacher:
    """What a dense block did: the inputs of some submodules (its own output as ""), and sum |y|^2 of layers' outputs."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    yy: dict[str, float] = field(default_factory=dict)


class _Sums:
    """Running float64 sums over batches of float32 products."""

    def __init__(self) -> None:
        self.K: Any = 0.0
        self.T: Any = 0.0
        self.x: Any = 0.0
        self.y: Any = 0.0
        self.yy = 0.0
        self.count = 0

    def add(self, K: Tensor, T: Tensor, x: Tensor, y: Tensor) -> None:
        """Adds a batch: K (n, n), T (m, n), x (tokens, n), y (tokens, m)."""
        self.K = self.K + K.double()
        self.T = self.T + T.double()
        self.x = self.x + x.sum(0, dtype=torch.float64)
        self.y = self.y + y.sum(0, dtype=torch.float64)
        self.count += len(x)

    def moments(self, bias: Tensor | None) -> Moments:
        """Of y itself; with means where a bias is there to take them."""
        if bias is None:
            return Moments(self.K, self.T, self.yy, self.count)
        return Moments(self.K, self.T, self.yy, self.count, self.x / self.count, self.y / self.count)

    def through(self, W: Tensor, bias: Tensor | None, yy: float) -> Moments:
        """Of W y + bias, where the sums are those of the teacher's inputs y."""
        if bias is None:
            return Moments(self.K, W @ self.T, yy, self.count)
        T = W @ self.T + torch.outer(bias, self.x)
        return Moments(self.K, T, yy, self.count, self.x / self.count, W @ self.y / self.count + bias)


def _run_student(
    block: Block, module: nn.Module, group: list[str], writers: dict[str, Writer], state: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The group's input, the outputs of its writers, and the residual streams that they write to, by place."""
    if not writers:
        return _input_of(block, module, group[0], state), {}, {}
    places = {writer.place for writer in writers.values()} - {""}
    with tapped(module, {group[0]} | places, writers) as taps:
        output = block.run(state, module)
    return taps.inputs[group[0]], taps.outputs, {**taps.inputs, "": output}


class _Stop(Exception):  # noqa: N818 (ends a forward pass early)
    """All that is wanted of a forward pass has been seen."""


def _input_of(block: Block, module: nn.Module, name: str, state: Tensor) -> Tensor:
    """A layer's input; what comes after it is not run."""
    taken: list[Tensor] = []

    def stop(args: tuple[Any, ...]) -> None:
        taken.append(args[0])
        raise _Stop

    with hooked(module, {name: (stop, None)}), contextlib.suppress(_Stop):
        block.run(state, module)
    return taken[0]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _replace(module: nn.Module, name: str, fit: Fit) -> None:
    """Puts factors in a layer's place."""
    out, in_ = fit.U.shape[0], fit.V.shape[0]
    layer = SpectralLinear(in_, out, len(fit.s), bias=fit.bias is not None)
    layer.U, layer.s, layer.V = (nn.Parameter(factor, requires_grad=False) for factor in (fit.U, fit.s, fit.V))
    if fit.bias is not None:
        layer.bias = nn.Parameter(fit.bias.float(), requires_grad=False)
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)
