"""The training loop: windows in, factors back on the manifold after every step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..head import ends
from ..memory import freed_memory_kept, release_free
from ..precision import products
from ..retraction import absorb_, drift, polar_direction, retract, retract_, tangent
from ..spectral import SpectralLayer
from .attention import probabilities_kept
from .data import Batch, TrainData
from .gated import in_slices
from .objective import Objective
from .optimizer import SpectralAdam, turn_
from .options import TrainError, TrainOptions
from .reversal import reversing, try_blocks
from .stepping import Stepping
from .teacher import Teacher


@dataclass
class Progress:
    """A line of `metrics.jsonl`.

    Attributes:
        step: steps done.
        loss: mean over the step's learned tokens, nats; with a teacher the mixture that was minimised.
        rate: what the rates were multiplied with.
        gradient: norm of all gradients before clipping.
        tokens_per_second: trained on, since the start of this run.
        drift: largest |X^T X - I| over U and V, where it was looked at.
        held_out: cross-entropy on held-out windows in nats, where it was looked at.
    """

    step: int
    loss: float
    rate: float
    gradient: float
    tokens_per_second: float
    drift: float | None = None
    held_out: float | None = None


@dataclass
class TrainState:
    """Where a run stands: all that the next step depends on, the weights apart.

    Attributes:
        step: steps done.
        optimizer: with its moments.
        best: least held-out loss so far; best_step: after how many steps.
        looks: looks at the held-out windows since then.
        is_whole: whether the weights are those after `step` steps and all that belongs to a step was done, the look and
            `on_step` included; while a step moves them it is not.
    """

    step: int
    optimizer: Optimizer
    best: float = math.inf
    best_step: int = 0
    looks: int = 0
    is_whole: bool = True
    history: list[Progress] = field(default_factory=list)


def train(
    model: nn.Module,
    data: TrainData,
    options: TrainOptions,
    *,
    teacher: Teacher | None = None,
    state: TrainState | None = None,
    on_step: Callable[[Progress], None] | None = None,
    on_best: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Trains a model in place; its matrices are in what `options.weights` says, see `load_weights`.

    Args:
        model: a causal language model of transformers with spectral layers.
        data: windows; see `load_data`.
        options: see there.
        teacher: over the same vocabulary, for distillation; see `ModelTeacher` and `CachedTeacher`.
        state: of a run to go on with; see `start`.
        on_step: called after every step.
        on_best: called when the held-out loss is the least so far, the model being as it was measured.

    Returns:
        The state after the last step; U and V are on the manifold.

    Raises:
        TrainError: a loss that is not finite, a teacher with another vocabulary, or weights that are not what the options say.
    """
    device = next(model.parameters()).device
    options = options.resolved(device)
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters() if parameter.ndim > 1}
    if ("bfloat16" in kinds) != (options.weights == "bfloat16"):
        raise TrainError(
            f"--weights {options.weights}: the model's matrices are {', '.join(sorted(kinds))}; load it with load_weights"
        )
    objective = Objective(model, options, teacher)
    state = state or start(model, options)
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    with contextlib.ExitStack() as stack:
        stack.enter_context(freed_memory_kept())
        moves = state.optimizer if options.step_in_backward else None
        stepping = stack.enter_context(Stepping(model, moves))
        stack.enter_context(lean(model, options))
        if options.checkpointing == "factors":
            stack.enter_context(reversing(model))
            with products(device, bool(options.bf16)):
                try_blocks(model)  # before anything is written
        if options.checkpointing == "blocks":
            model.activation_checkpointing_enable()  # type: ignore[operator]
        began, trained = time.perf_counter(), 0
        if state.step == 0:
            _look(model, objective, data, options, state, on_best)
        model.train()
        while state.step < options.steps and not (options.patience and state.looks >= options.patience):
            rate = options.factor(state.step)
            for group in state.optimizer.param_groups:
                group["rate" if "rate" in group else "lr"] = rate * group["full_rate"]
            state.optimizer.zero_grad()
            batch = data.batch(state.step, options.batch, options.seed).to(device)
            stepping.squares = 0.0
            total = _descend(objective, batch, options, stepping, state)
            left = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            if options.clip and not isinstance(state.optimizer, SpectralAdam):
                nn.utils.clip_grads_with_norm_(parameters, options.clip, left)
            norm = math.sqrt(float(stepping.squares) + float(left) ** 2)
            if not math.isfinite(total) or not math.isfinite(norm):
                what = f"the loss is {total}" if not math.isfinite(total) else f"the gradient's norm is {norm}"
                raise TrainError(
                    f"step {state.step + 1}: {what}; lower the rates; files of earlier steps are as they were"
                )
            state.is_whole = False
            if options.step_in_backward:
                release_free()  # what moves now, embeddings and head, fits into no hole that the blocks left
            state.optimizer.step()
            state.step += 1
            last = state.step == options.steps
            looks = last or (options.eval_every > 0 and state.step % options.eval_every == 0)
            _come_back_(model, options, state, final=last)
            trained += batch.windows.numel()
            progress = Progress(state.step, total, rate, norm, trained / (time.perf_counter() - began))
            if looks:
                progress.drift = drift(model)
                progress.held_out = _look(model, objective, data, options, state, on_best)
                model.train()
            state.history.append(progress)
            if on_step:
                on_step(progress)
            state.is_whole = True
    model.eval()
    return state


@contextlib.contextmanager
def lean(model: Any, options: TrainOptions) -> Iterator[None]:
    """Within, a model's passes take the ways that need little memory, where the options ask for that."""
    with contextlib.ExitStack() as stack:
        if options.is_lean:
            stack.enter_context(in_slices(model))
        if options.checkpointing != "none":
            stack.enter_context(probabilities_kept())
        yield


def _descend(objective: Objective, batch: Batch, options: TrainOptions, stepping: Stepping, state: TrainState) -> float:
    """Adds the gradients of a step, a micro-batch at a time; returns its loss."""
    scale, total = 1.0 / max(1, int(batch.predicted.sum())), 0.0
    parts = list(batch.split(options.micro_batch))
    for place, part in enumerate(parts):
        stepping.on = place == len(parts) - 1
        state.is_whole = not (stepping.on and options.step_in_backward)
        total += objective.descend(part, scale)
        if not math.isfinite(total):
            break
    return total


def _come_back_(model: nn.Module, options: TrainOptions, state: TrainState, *, final: bool) -> None:
    """Brings U and V back to the manifold where the optimiser has not done so itself."""
    if options.retraction == "absorb":
        rotated: dict[nn.Parameter, Tensor] = {}
        for layer in dict.fromkeys(layer for layer in model.modules() if isinstance(layer, SpectralLayer)):
            if layer.U not in rotated:  # not of a tied layer twice
                rotation = absorb_(layer)
                rotated |= {layer.U: rotation.P, layer.V: rotation.R}
        turn_(state.optimizer, rotated)
    elif options.retraction == "none":
        if final:
            retract_(model)
    elif options.optimizer == "adamw" and (final or state.step % options.retract_every == 0):
        retract_(model, options.retraction)  # type: ignore[arg-type]


def start(model: nn.Module, options: TrainOptions) -> TrainState:
    """The state before the first step: what is trained, in groups by kind, each with its rate.

    Raises:
        TrainError: nothing is left to train.
    """
    options = options.resolved(next(model.parameters()).device)
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter, kind, rate in _kinds(model, options):
        parameter.requires_grad_(rate > 0.0)
        if rate > 0.0:
            groups.setdefault((kind, rate), []).append(parameter)
    if not groups:
        raise TrainError(f"--train {options.train}: leaves nothing to train; all rates of what is selected are 0")
    if options.optimizer == "adamw":
        plain = [{"params": params, "full_rate": rate} for (_, rate), params in groups.items()]
        return TrainState(0, torch.optim.AdamW(plain, lr=0.0, betas=(0.9, 0.99), weight_decay=options.weight_decay))
    listed = [{"params": params, "kind": kind, "full_rate": rate} for (kind, rate), params in groups.items()]
    afterwards = options.retraction in ("none", "absorb")
    back = None if afterwards else lambda X: retract(X, options.retraction)  # type: ignore[arg-type]
    more: dict[str, Any] = {"weight_decay": options.weight_decay, "momentum": options.momentum, "seed": options.seed}
    more["clip"] = options.clip
    polar = polar_direction if options.direction == "polar" else None
    return TrainState(0, SpectralAdam(listed, tangent=tangent, retract=back, polar=polar, **more))


def _kinds(model: nn.Module, options: TrainOptions) -> Iterator[tuple[nn.Parameter, str, float]]:
    """Every parameter with its kind and its rate, 0 for those that are not trained."""
    heads = {id(parameter) for module in ends(model) for parameter in module.parameters()}
    seen: set[int] = set()
    adamw = options.optimizer == "adamw"
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_factor = isinstance(module, SpectralLayer) and name in ("U", "s", "V")
            if id(parameter) in heads and not (is_factor and options.embedding_rate):
                kind, rate = "plain", options.embedding_rate
            elif is_factor and name == "s":
                kind, rate = "singular", options.rate if adamw else options.singular_rate
            elif is_factor:
                kind, rate = "stiefel", options.rate if adamw else options.angle
            elif parameter.ndim == 1:
                kind, rate = "plain", options.norm_rate
            else:
                kind, rate = "plain", options.rate
            wanted = {"all": True, "factors": is_factor, "norms": parameter.ndim == 1 and not is_factor}[options.train]
            yield parameter, kind, (rate if wanted else None) or 0.0


@torch.no_grad()
def _look(
    model: nn.Module,
    objective: Objective,
    data: TrainData,
    options: TrainOptions,
    state: TrainState,
    on_best: Callable[[TrainState], None] | None,
) -> float:
    """Cross-entropy on the held-out windows in nats a token; says so where it is the least so far."""
    model.eval()
    batch = data.held_out.to(next(model.parameters()).device)
    total = sum(objective.cross_entropy(part) for part in batch.split(options.micro_batch))
    loss = total / max(1, int(batch.predicted.sum()))
    state.looks += 1
    if loss < state.best:
        state.best, state.best_step, state.looks = loss, state.step, 0
        if on_best:
            on_best(state)
    return loss
