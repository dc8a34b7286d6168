"""What a training run will need in memory, part by part, before it begins.

The model is built of tensors without storage, and a step's forward pass on them says what autograd will keep; the rest is
counted from shapes. A teacher in the same memory comes on top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from sctconv.formats.reader import SctFile

from ..head import ends
from ..memory import rss_bytes
from ..model import load
from ..precision import products
from ..skeleton import build_skeleton, factor_, load_config
from ..spectral import SpectralLayer
from ..tensors import TOGETHER
from .loop import lean, start
from .objective import logits_bytes
from .options import TrainError, TrainOptions
from .reversal import is_reversible, model_blocks
from .run import is_fresh

_LATER: Final = 64 << 20
"""What libraries take once they work: the tokenizer, compiled kernels, pages of code."""
_LOGITS: Final = 4.5
"""Logits in float32 at once: themselves, in bfloat16, their logarithms, the gradient of both."""
_STACKED: Final = 5
"""Copies of factors that move together that an optimiser's step holds: stacked, gradient, momentum, and products of those."""
_ALONE: Final = 2
"""The same of a parameter that moves entry by entry."""


def estimate(path: str | os.PathLike[str], options: TrainOptions, device: torch.device | str = "cpu") -> dict[str, int]:
    """Bytes by part, and `peak`, their sum: what the passes leave free is not what the step takes, in practice.

    Args:
        path: the .sct file to train.
        options: how.
        device: where; on a GPU the libraries are not counted.

    Raises:
        FormatError: the file is damaged. ModelError: transformers cannot build the model.
    """
    libraries = rss_bytes() + _LATER if torch.device(device).type == "cpu" else 0
    with SctFile(path) as file:
        options = options.resolved(torch.device(device), scratch=is_fresh(file.index.metadata))
        files = {name: file.file(name) for name in ("config.json",)}
        model = build_skeleton(
            load_config(files, str(path), [entry.shape for entry in file.index.tensors.values()]), str(path)
        )
        factor_(model, {name: record.rank for name, record in file.index.layers.items()})
    with FakeTensorMode(allow_non_fake_inputs=True):
        _imagine_(model, getattr(torch, options.weights))
        optimizer = start(model, options).optimizer
        trained = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
        kept, block = _activations(model, options)
    largest = max(parameter.numel() for parameter, _ in trained)
    at_ends = {id(parameter) for module in ends(model) for parameter in module.parameters()}
    at_once = options.step_in_backward and options.batch == options.micro_batch
    held = [parameter for parameter, _ in trained if not at_once or id(parameter) in at_ends]
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = options.micro_batch * options.context
    parts = {
        "libraries": libraries,
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "first moments": sum(_kept(optimizer, parameter, "first", "first_scale") for parameter, _ in trained),
        "second moments": sum(_kept(optimizer, parameter, "second_rows", "second") for parameter, _ in trained),
        "gradients": sum(parameter.nbytes for parameter in held) + (4 * largest if at_once else 0),
        "activations": kept + block,
        "logits": int(_LOGITS * min(logits_bytes(options), 4 * tokens * vocabulary)) + _cut_head(model, options),
        "step": 4 * _step(trained, options),
    }
    return {**parts, "peak": sum(parts.values())}


def fitted(path: str | os.PathLike[str], options: TrainOptions, limit: int, device: torch.device | str) -> TrainOptions:
    """The options with as few levers as bring the estimate within a limit: first those that change no number.

    Raises:
        TrainError: all of them do not. Otherwise see `estimate`.
    """
    chosen, found = options, estimate(path, options, device)["peak"]
    for choices in _levers(path, options):
        if found <= limit:
            break
        tried = [replace(chosen, **changes) for changes in choices]
        peaks = [estimate(path, each, device)["peak"] for each in tried]
        chosen, found = tried[peaks.index(min(peaks))], min(peaks)
    if found > limit:
        raise TrainError(
            f"--max-memory: {found / 2**30:.2f} GiB are the least that {Path(path).name} trains in with windows of "
            f"{options.context} tokens, {limit / 2**30:.2f} are allowed; try a shorter --context or a smaller --micro-batch"
        )
    return chosen


def _levers(path: str | os.PathLike[str], options: TrainOptions) -> Iterator[list[dict[str, Any]]]:
    """One after the other; of each the choice that needs least."""
    if options.checkpointing == "none":
        yield [{"checkpointing": "factors" if is_reversible(load(path).model) else "blocks"}]
    cut: list[dict[str, Any]] = [{"micro_batch": 1}]
    if options.optimizer == "spectral":
        cut.append({"micro_batch": options.batch, "step_in_backward": True})
    yield cut
    if options.optimizer == "spectral":
        yield [{"momentum": "bfloat16"}]
        yield [{"momentum": "int8"}]
        yield [{"weights": "bfloat16", "bf16": None}]


def _imagine_(model: Any, dtype: torch.dtype) -> None:
    """Gives a skeleton tensors that have everything but numbers, as `run` would load it."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kind = dtype if parameter.ndim > 1 else torch.float32
                imagined = nn.Parameter(torch.empty(parameter.shape, dtype=kind))
                module._parameters[name] = made.setdefault(id(parameter), imagined)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()
    model.train()


def _activations(model: Any, options: TrainOptions) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass, and of one block while it is computed again."""
    blocks = model_blocks(model)
    owned = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    whole: dict[int, int] = {}
    first: dict[int, int] = {}
    inside = [False]

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in owned:
            whole[_storage(tensor)] = tensor.untyped_storage().nbytes()
            if inside[0]:
                first[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def enter(*_: Any) -> None:
        inside[0] = True

    def leave(*_: Any) -> None:
        inside[0] = False

    ids = torch.zeros(options.micro_batch, options.context, dtype=torch.long)
    hooks = [blocks[0].register_forward_pre_hook(enter), blocks[0].register_forward_hook(leave)] if blocks else []
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        products(ids.device, bool(options.bf16)),
        lean(model, options),
    ):
        state = model.base_model(input_ids=ids, use_cache=False)[0]
    for hook in hooks:
        hook.remove()
    if options.checkpointing == "none" or not blocks:
        return sum(whole.values()), 0
    once = 2 * sum(first.values())  # the block's own, and the gradients that go back through it
    if options.checkpointing == "blocks":
        return len(blocks) * state.nbytes, once
    ranks = [layer.rank for layer in model.modules() if isinstance(layer, SpectralLayer)]
    width = 2 if options.bf16 else 4
    return len(blocks) * 2 * max(ranks, default=0) * ids.numel() * width + 2 * state.numel() * 4, once


def _cut_head(model: Any, options: TrainOptions) -> int:
    """Bytes of a dense head in bfloat16, where products are; a factored one's are few."""
    head = model.get_output_embeddings()
    if head is None or isinstance(head, SpectralLayer) or not options.bf16 or options.weights == "bfloat16":
        return 0
    return 2 * int(head.weight.numel())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kept(optimizer: Optimizer, parameter: nn.Parameter, *names: str) -> int:
    """Bytes of an optimiser's state; torch's AdamW, which makes it at its first step, keeps each moment in float32."""
    state = optimizer.state.get(parameter)
    return sum(state[name].nbytes for name in names if name in state) if state else 4 * parameter.numel()


def _step(trained: list[tuple[nn.Parameter, dict[str, Any]]], options: TrainOptions) -> int:
    """Entries that an optimiser's step holds beside the parameters, at most."""
    stacked: dict[torch.Size, int] = {}
    most = 0
    for parameter, group in trained:
        if group.get("kind") != "stiefel":
            most = max(most, _ALONE * parameter.numel())
            continue
        before = 0 if options.step_in_backward else stacked.get(parameter.shape, 0)
        stacked[parameter.shape] = min(before + parameter.numel(), max(TOGETHER, parameter.numel()))
        most = max(most, _STACKED * stacked[parameter.shape])
    return most
