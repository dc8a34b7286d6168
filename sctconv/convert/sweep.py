"""The sweep: block by block in forward order, teacher and student side by side.

Each layer is fitted on the inputs that it will really get (the student's) to the outputs that it should give (the
teacher's). Layers that write to the residual stream aim further: at the teacher's stream less what the student's already
has, so every block also repairs what the blocks before it have lost. Linear layers that stay dense are fitted in the same
way, without a limit to their rank: they repair a good part of what the factored ones lose and cost no parameters
(SmolLM2-135M, MLP at rank 128, 32k tokens: perplexity 139.7 -> 106.6 with the attention's output projection alone). One
sweep; repeating it was measured to be worse.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sctconv.runtime.memory import release_free

from .blocks import Block, Passed, Writer, tapped
from .budget import MemoryPlan
from .calibration import Calibration
from .decoder import Decoder
from .fit import DenseFit, Fit, Moments, Root, closed_form, closed_form_dense, closed_form_dual, rank_by_output_energy
from .metric import Metric
from .refine import tune_block_
from .states import States
from .student import fits_of, replace_


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


@dataclass(frozen=True)
class SweptBlock:
    """What became of a block.

    Attributes:
        name: its path in the model.
        fits: its layers by their path in the model.
        tensors: of its other tensors those that refinement changed, by their names in the model.
        refinement: held-out losses of the block while it was refined; see `tune_block_`.
    """

    name: str
    fits: dict[str, Fit | DenseFit]
    tensors: dict[str, Tensor]
    refinement: list[float]


class Sweep:
    """Fits the layers of a decoder.

    Args:
        decoder: the dense checkpoint; its `layers` are factored, its `others` fitted as they are.
        ranks: layer -> rank of the layers to be factored.
        energies: layer -> share of the output's energy that decides its rank, where that is what decides.
        calibration: windows to fit on and to measure on.
        memory: how much may be held at once.
        metrics: layer -> what errors of its outputs cost.
        refine: steps of gradient descent on each block after its closed forms.
        done: a block's name -> what became of it in an earlier run, None where it is to be fitted.
        progress: called after each batch with the share of the work that is done and a word on what is being done.
    """

    def __init__(
        self,
        decoder: Decoder,
        ranks: Mapping[str, int],
        calibration: Calibration,
        memory: MemoryPlan,
        *,
        energies: Mapping[str, float] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        refine: int = 0,
        done: Callable[[str], SweptBlock | None] = lambda name: None,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self._decoder = decoder
        self._ranks = ranks
        self._energies = energies or {}
        self._metrics = metrics or {}
        self._refine = refine
        self._known = done
        self._memory = memory
        self._progress = progress
        windows = torch.cat([calibration.held_out, calibration.fit])
        is_fit = torch.arange(len(windows)) >= len(calibration.held_out)
        batch = min(memory.batch, len(windows))
        count = len(windows) // batch * batch  # one shape for all batches; the rest, less than a batch, is left out
        self._batches = windows[:count].reshape(-1, batch, windows.shape[1])
        self._is_fit = is_fit[:count].reshape(-1, batch)
        self._done, self._passes = 0.0, 1
        self.result = SweepResult()

    @torch.no_grad()
    def run(self) -> Iterator[SweptBlock]:
        """Yields the blocks in forward order."""
        count = len(self._batches)
        teacher = States.of(self._decoder.embed(list(self._batches)), count, self._memory.spill)
        student = States.of(teacher, count, self._memory.spill)
        for place in range(len(self._decoder)):
            block = self._decoder.block(place, teacher[0])
            release_free()
            self._done = place
            swept = self._known(block.name)
            if swept is None:
                swept = self._fit_block(block, teacher, student)
            else:
                self._pass_by(block, teacher, swept)
            for number in range(count):
                student[number] = self._step(block, student, number)
            self.result.distances.append(self._distance(teacher, student))
            del block  # nothing of it is held while the fits are written
            yield swept
            del swept  # nor while the next block is fitted
            release_free()
        self._measure(teacher, student)

    def _fit_block(self, block: Block, teacher: States, student: States) -> SweptBlock:
        """Moves the teacher's states through a block and puts fits in the place of its layers."""
        self._passes = 2 + len(block.groups)
        seen = self._teach(block, teacher)
        fits: dict[str, Fit | DenseFit] = {}
        for group in block.groups:
            for name, fit in self._fit_group(block, group, student, seen):
                fits[name] = fit
                replace_(block.module, name, fit)  # its own weight is let go, as the teacher is through
        tensors: dict[str, Tensor] = {}
        refinement: list[float] = []
        if self._refine:
            refinement = tune_block_(block, student, teacher, self._is_fit, self._refine, names=list(fits))
            fits = dict(fits_of(block.module, fits))
            tensors = {name: p.detach() for name, p in block.module.named_parameters() if p.ndim == 1}
            tensors = {name: p for name, p in tensors.items() if name.rpartition(".")[0] not in fits}
            for name, fit in fits.items():
                replace_(block.module, name, fit)
        return SweptBlock(
            block.name,
            {f"{block.name}.{name}": fit for name, fit in fits.items()},
            {f"{block.name}.{name}": tensor for name, tensor in tensors.items()},
            refinement,
        )

    def _pass_by(self, block: Block, teacher: States, swept: SweptBlock) -> None:
        """The same with fits that are known."""
        self._passes = 2
        for number in range(len(teacher)):
            teacher[number] = self._step(block, teacher, number)
        for path, fit in swept.fits.items():
            replace_(block.module, path.removeprefix(f"{block.name}."), fit)
        for path, tensor in swept.tensors.items():
            block.module.get_parameter(path.removeprefix(f"{block.name}.")).data.copy_(tensor)
        block.module.to(self._decoder.device)

    def _report(self, what: str) -> None:
        """One batch of one pass through a block is done; blocks count alike."""
        self._done += 1.0 / (self._passes * len(self._batches))
        if self._progress:
            self._progress(min(1.0, self._done / len(self._decoder)), what)

    def _step(self, block: Block, states: States, number: int) -> Tensor:
        self._report(block.name)
        return block.run(states[number].to(self._decoder.device), bf16=self._is_fast(number))

    def _is_fast(self, number: int) -> bool:
        """What the held-out windows say is what the file gives: they never go through bfloat16."""
        return self._memory.bf16 and bool(self._is_fit[number].all())

    def _teach(self, block: Block, states: States) -> _Teacher:
        """Runs the dense block on the teacher's states, in place, and keeps what the student's layers aim at."""
        seen = _Teacher()
        plain = {name for group in block.groups for name in group} - set(block.writers)
        firsts = {group[0] for group in block.groups if plain.intersection(group)}
        places = {writer.place for writer in block.writers.values()} - {""}
        with tapped(block.module, firsts | places, plain) as taps:
            for number in range(len(states)):
                states[number] = self._step(block, states, number)
                for name, x in taps.inputs.items():
                    if name not in seen.inputs:
                        seen.inputs[name] = States(len(states), tuple(x.shape), self._memory.spill)
                    seen.inputs[name][number] = x
                for name, y in taps.outputs.items():
                    energy = float(y[self._is_fit[number]].double().square().sum())
                    seen.yy[name] = seen.yy.get(name, 0.0) + energy
        seen.inputs[""] = states
        return seen

    def _fit_group(
        self, block: Block, group: list[str], states: States, seen: _Teacher
    ) -> Iterator[tuple[str, Fit | DenseFit]]:
        """Fits layers that share an input, one after the other."""
        plain = [name for name in group if name not in block.writers]
        writers = {name: block.writers[name] for name in group if name in block.writers}
        dual = _Layer.of(block, group[0]).W.shape[1] > self._memory.gram_side
        sums = {name: _Sums(dual, self._memory.dual_tokens) for name in (*writers, *([""] if plain else []))}
        for number, state in enumerate(states):
            self._report(block.name)
            rows = self._is_fit[number]
            state = state.to(self._decoder.device)
            x, outputs, streams = _run_student(block, group, writers, state, self._is_fast(number))
            x = _flat(x[rows])
            if plain:
                sums[""].add(x, _flat(seen.inputs[group[0]][number][rows]).to(x))
            for name, writer in writers.items():
                z = seen.inputs[writer.place][number].to(x)
                y = (z - streams[writer.place]) / writer.scale + outputs[name]
                sums[name].add(x, _flat(y[rows]))
        del x, outputs, streams
        release_free()  # before the closed forms, which are what the budget is spent on
        root: Root | None = None
        for name in group:
            layer = _Layer.of(block, name)
            path = f"{block.name}.{name}"
            rank, energy, metric = self._ranks.get(path), self._energies.get(path), self._metrics.get(path)
            own = sums[name if name in writers else ""]
            if dual:
                if rank is not None:  # one that stays dense would need the Gram matrix; it stays as it is
                    yield name, own.fit_tokens(layer, rank, metric, through=name in plain)
                continue
            moments = own.moments(layer, seen.yy[name] if name in plain else None)
            if root is None or layer.bias is not None or name in writers:
                root = Root.of(moments.centred().K)
            if energy is not None:
                rank = rank_by_output_energy(moments, energy, prior=layer.W, root=root, metric=metric)
                m, n = layer.W.shape
                rank = rank if rank * (m + n + 1) < m * n else None
            if rank is None:
                yield name, closed_form_dense(moments, prior=layer.W, root=root)
            else:
                yield name, closed_form(moments, rank, prior=layer.W, root=root, metric=metric)

    def _distance(self, teacher: States, student: States) -> float:
        difference = norm = 0.0
        for t, s, is_fit in zip(teacher, student, self._is_fit, strict=True):
            if not is_fit.all():
                t, s = t[~is_fit], s[~is_fit]
                difference += float((t - s).double().square().sum())
                norm += float(t.double().square().sum())
        return math.sqrt(difference / norm) if norm else math.nan

    def _measure(self, teacher: States, student: States) -> None:
        """Perplexity and KL on the held-out windows, some tokens at a time: logits are the largest thing in the whole sweep."""
        held_out = ~self._is_fit
        parts = self._decoder.parts(1, self._batches.shape[-1] - 1)
        windows = list(self._batches[held_out])
        states = [
            [
                row[None, part]
                for state, keep in zip(side, held_out, strict=True)
                for row in state[keep]
                for part in parts
            ]
            for side in (teacher, student)
        ]
        tokens_in = [window[None, part] for window in windows for part in parts]
        targets = [window[1:][part] for window in windows for part in parts]
        heads = zip(*(self._decoder.head(side, tokens_in) for side in states), strict=True)
        nll, kl, tokens = [0.0, 0.0], 0.0, 0
        for target, pair in zip(targets, heads, strict=True):
            target = target.to(self._decoder.device)
            logs = [F.log_softmax(logits[0], -1) for logits in pair]
            for place, log in enumerate(logs):
                nll[place] += float(F.nll_loss(log, target, reduction="sum"))
            kl += float(F.kl_div(logs[1], logs[0], reduction="sum", log_target=True))
            tokens += target.numel()
        self.result.teacher_perplexity, self.result.perplexity = (math.exp(min(value / tokens, 700)) for value in nll)
        self.result.kl = kl / tokens


@dataclass
class _Teacher:
    """What a dense block did: the inputs of some submodules (its own output as ""), and sum |y|^2 of layers' outputs."""

    inputs: dict[str, States] = field(default_factory=dict)
    yy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layer:
    W: Tensor  # (m, n) float32
    bias: Tensor | None  # float64

    @classmethod
    def of(cls, block: Block, name: str) -> _Layer:
        bias: Any = block.module.get_submodule(name).bias
        return cls(block.weight(name), bias.detach().double() if bias is not None else None)


class _Sums:
    """Of inputs x and what belongs to them, y: running float64 sums of float32 products, or the tokens themselves."""

    def __init__(self, dual: bool, most: int) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._dual, self._most = dual, most
        self.K: Any = 0.0
        self.T: Any = 0.0
        self.x: Any = 0.0
        self.y: Any = 0.0
        self.yy = 0.0
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch: x (tokens, n), y (tokens, m)."""
        if self._dual:
            room = self._most - self.count
            self._kept.append((x[:room].clone(), y[:room].clone()))
            self.count += len(x[:room])
            return
        self.K = _plus(self.K, x.T @ x)
        self.T = _plus(self.T, y.T @ x)
        self.x = self.x + x.sum(0, dtype=torch.float64)
        self.y = self.y + y.sum(0, dtype=torch.float64)
        self.yy += float(y.double().square().sum())
        self.count += len(x)

    def fit_tokens(self, layer: _Layer, rank: int, metric: Metric | None, *, through: bool) -> Fit:
        """The closed form from the tokens themselves, of W y where y is another input of the layer. Its bias stays."""
        x, y = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        if through:
            y = y @ layer.W.T
        elif layer.bias is not None:
            y -= layer.bias.float()
        fit = closed_form_dual(x, y, rank, prior=layer.W, metric=metric)
        return replace(fit, bias=layer.bias)

    def moments(self, layer: _Layer, through: float | None) -> Moments:
        """Of y itself; or, given sum |W y + b|^2, of W y + b. With means where a bias is there to take them."""
        if layer.bias is None:
            if through is None:
                return Moments(self.K, self.T, self.yy, self.count)
            return Moments(self.K, self.T, through, self.count, W=layer.W)
        x, y, T = self.x / self.count, self.y / self.count, self.T
        if through is not None:
            W = layer.W.double()
            T, y = W @ T + torch.outer(layer.bias, self.x), W @ y + layer.bias
        return Moments(self.K, T, self.yy if through is None else through, self.count, mean_x=x, mean_y=y)


def _plus(sum_: Any, part: Tensor) -> Tensor:
    """In place, as float64 copies of these matrices are what memory is spent on."""
    return sum_.add_(part) if isinstance(sum_, Tensor) else part.double()


def _run_student(
    block: Block, group: list[str], writers: dict[str, Writer], state: Tensor, bf16: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The group's input, the outputs of its writers, and the residual streams that they write to, by place."""
    places = {writer.place for writer in writers.values()}
    until = next(iter(places or {group[0]})) if len(places) < 2 else ""
    output = state
    with tapped(block.module, {group[0]} | places - {""}, writers, until=until) as taps, contextlib.suppress(Passed):
        output = block.run(state, bf16=bf16)
    return taps.inputs[group[0]], taps.outputs, {**taps.inputs, "": output}


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
