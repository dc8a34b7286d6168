"""The training loop: windows in, factors back on the manifold after every step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..retraction import drift, retract, retract_, tangent
from ..spectral import SpectralLinear
from .data import TrainData
from .optimizer import SpectralAdam
from .options import TrainError, TrainOptions

_ROWS: Final = 1024
"""Predicted tokens whose logits are held in float32 at once."""


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
    """

    step: int
    optimizer: Optimizer
    best: float = math.inf
    best_step: int = 0
    history: list[Progress] = field(default_factory=list)


def train(
    model: nn.Module,
    data: TrainData,
    options: TrainOptions,
    *,
    teacher: nn.Module | None = None,
    state: TrainState | None = None,
    on_step: Callable[[Progress], None] | None = None,
    on_best: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Trains a model in place, float32 weights.

    Args:
        model: a causal language model of transformers with `SpectralLinear` layers.
        data: windows; see `load_data`.
        options: see there.
        teacher: a dense or factored model over the same vocabulary, for distillation; may be of another dtype and device.
        state: of a run to go on with; see `start`.
        on_step: called after every step.
        on_best: called when the held-out loss is the least so far, the model being as it was measured.

    Returns:
        The state after the last step; U and V are on the manifold.

    Raises:
        TrainError: a loss that is not finite, or a teacher with another vocabulary.
    """
    device = next(model.parameters()).device
    _check_teacher(model, teacher)
    state = state or start(model, options)
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    if options.checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    began, trained = time.perf_counter(), 0
    if state.step == 0:
        _look(model, data, options, state, on_best)
    model.train()
    while state.step < options.steps:
        rate = options.factor(state.step)
        for group in state.optimizer.param_groups:
            group["rate" if "rate" in group else "lr"] = rate * group["full_rate"]
        state.optimizer.zero_grad()
        windows, learned = (part.to(device) for part in data.batch(state.step, options.batch, options.seed))
        predicted = int(learned[:, 1:].sum())
        total = 0.0
        for part, mask in zip(windows.split(options.micro_batch), learned.split(options.micro_batch), strict=True):
            loss = _loss(model, part, mask, options, teacher) / max(1, predicted)
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise TrainError(
                f"step {state.step + 1}: the loss is {total}; lower the rates, or start again from the last checkpoint"
            )
        norm = float(nn.utils.clip_grad_norm_(parameters, options.clip or math.inf))
        state.optimizer.step()
        state.step += 1
        if options.optimizer == "adamw" and options.retraction != "none" and state.step % options.retract_every == 0:
            retract_(model, options.retraction)  # type: ignore[arg-type]
        trained += windows.numel()
        progress = Progress(state.step, total, rate, norm, trained / (time.perf_counter() - began))
        last = state.step == options.steps
        if last:
            retract_(model, "qr" if options.retraction == "none" else options.retraction)  # type: ignore[arg-type]
        if last or (options.eval_every and state.step % options.eval_every == 0):
            progress.drift = drift(model)
            progress.held_out = _look(model, data, options, state, on_best)
            model.train()
        state.history.append(progress)
        if on_step:
            on_step(progress)
    model.eval()
    return state


def start(model: nn.Module, options: TrainOptions) -> TrainState:
    """The state before the first step: what is trained, in groups by kind, each with its rate.

    Raises:
        TrainError: nothing is left to train.
    """
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
    back = None if options.retraction == "none" else lambda X: retract(X, options.retraction)  # type: ignore[arg-type]
    return TrainState(0, SpectralAdam(listed, tangent=tangent, retract=back, weight_decay=options.weight_decay))


def _kinds(model: nn.Module, options: TrainOptions) -> Iterator[tuple[nn.Parameter, str, float]]:
    """Every parameter with its kind and its rate, 0 for those that are not trained."""
    heads: set[int] = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        if module is not None:
            heads |= {id(parameter) for parameter in module.parameters()}
    seen: set[int] = set()
    adamw = options.optimizer == "adamw"
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_factor = isinstance(module, SpectralLinear) and name in ("U", "s", "V")
            if id(parameter) in heads:
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
            yield parameter, kind, rate if wanted else 0.0


def _loss(
    model: nn.Module, windows: Tensor, learned: Tensor, options: TrainOptions, teacher: nn.Module | None
) -> Tensor:
    """Sum over learned tokens; logits in float32 a few rows at a time."""
    targets, mask = windows[:, 1:], learned[:, 1:]
    with _products(windows.device, options.bf16):
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1][mask]
    if teacher is None or not options.teacher_weight:
        pieces = zip(logits.split(_ROWS), targets[mask].split(_ROWS), strict=True)
        return sum((F.cross_entropy(rows.float(), row, reduction="sum") for rows, row in pieces), logits.new_zeros(()))
    with torch.no_grad():
        device = next(teacher.parameters()).device
        taught = teacher(input_ids=windows.to(device), use_cache=False).logits[:, :-1].to(logits.device)[mask]
    total = logits.new_zeros((), dtype=torch.float32)
    weight, temperature = options.teacher_weight, options.temperature
    parts = zip(logits.split(_ROWS), taught.split(_ROWS), targets[mask].split(_ROWS), strict=True)
    for rows, teacher_rows, row in parts:
        own = F.log_softmax(rows.float() / temperature, -1)
        other = F.log_softmax(teacher_rows.float() / temperature, -1)
        kl = F.kl_div(own, other, reduction="sum", log_target=True) * temperature**2
        total = total + weight * kl + (1.0 - weight) * F.cross_entropy(rows.float(), row, reduction="sum")
    return total


@torch.no_grad()
def _look(
    model: nn.Module,
    data: TrainData,
    options: TrainOptions,
    state: TrainState,
    on_best: Callable[[TrainState], None] | None,
) -> float:
    """Cross-entropy on the held-out windows in nats a token; says so where it is the least so far."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    pairs = zip(data.held_out.split(options.micro_batch), data.held_out_learned.split(options.micro_batch), strict=True)
    for windows, learned in pairs:
        total += float(_loss(model, windows.to(device), learned.to(device), options, None))
        count += int(learned[:, 1:].sum())
    loss = total / max(1, count)
    if loss < state.best:
        state.best, state.best_step = loss, state.step
        if on_best:
            on_best(state)
    return loss


def _products(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def _check_teacher(model: Any, teacher: Any) -> None:
    if teacher is None:
        return
    own, other = (each.config.get_text_config().vocab_size for each in (model, teacher))
    if own != other:
        raise TrainError(f"the teacher has a vocabulary of {other}, the model one of {own}; they must be the same")
