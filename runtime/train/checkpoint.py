"""A trained model as a .sct file, and a run that can be gone on with as one that also holds its moments.

A checkpoint is an ordinary .sct file with float32 weights: it loads, evaluates and generates like any other. What a run
needs besides is in tensors named `optimizer.first.NAME` (with `first_scale` where those are 8 bits),
`optimizer.second.NAME` (of factors `second_rows` too) and `optimizer.order.LAYER` and in `metadata["training"]`; it is
written whole or not at all, with checksums, like every .sct file.

Training keeps a layer's columns where they are, and a step may move a singular value past its neighbour or, with AdamW,
below zero, which the format does not allow. So they are written in order, and `order` says where each was and with which
sign: column i was column |order_i| - 1, U and s times the sign of order_i. Undoing that is exact.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from sctconv.formats.dtypes import FLOATS, numpy_dtype
from sctconv.formats.index import TensorEntry
from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter

from ..retraction import absorbed
from ..spectral import SpectralLayer
from ..tensors import mapped_tensor, to_numpy
from .loop import TrainState
from .options import TrainError, TrainOptions

_MOMENTS: Final = "optimizer."


def save_model(
    model: nn.Module,
    source: SctFile,
    path: str | os.PathLike[str],
    *,
    training: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a trained model in the dtypes of the file that it came from, in SCT form: s descending and not negative.

    Layer records lose what was said of the truncation, which is no longer true.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(model, source, path, {"training": dict(training)}, None, overwrite=overwrite)


def save_checkpoint(
    model: nn.Module,
    source: SctFile,
    state: TrainState,
    options: TrainOptions,
    facts: Mapping[str, str | None],
    path: str | os.PathLike[str],
) -> None:
    """Writes all that a run needs to go on exactly where it is; replaces what stands there.

    Args:
        model: as it is; source: the file that it came from.
        state: where the run stands.
        options: the run's.
        facts: what else decides it, by name: its data, its teacher.
        path: the file to write.

    Raises:
        OutputError: the file cannot be written.
    """
    training = {
        "options": options.to_json(),
        "facts": dict(facts),
        "step": state.step,
        "best": state.best,
        "best_step": state.best_step,
        "looks": state.looks,
        "counts": {name: count for name, count in _counts(model, state) if count != state.step},
    }
    _write(model, source, path, {"training": training}, state, overwrite=True)


def restore(
    model: nn.Module,
    state: TrainState,
    options: TrainOptions,
    facts: Mapping[str, str | None],
    path: str | os.PathLike[str],
) -> TrainState:
    """Puts a checkpoint's weights into a model and its moments into a fresh state.

    Raises:
        FormatError: the file is damaged or none. TrainError: it is no checkpoint, or of a run with other options or facts
            (see `save_checkpoint`); the first that differs is named.
    """
    with SctFile(path) as file:
        kept, tensors = file.index.metadata.get("training"), file.index.tensors
        if not isinstance(kept, dict) or not any(name.startswith(_MOMENTS) for name in tensors):
            raise TrainError(f"{path}: a model, not a checkpoint of a run; train it without --resume")
        run = _Run.parsed(kept, path)
        for name, value in {**options.to_json(), **facts}.items():
            if run.identity.get(name) != value:
                theirs = run.identity.get(name)
                raise TrainError(f"{path}: was made with {name} {theirs}, not {value}; resume it as it was begun")
        if not run.best_step <= run.step <= options.steps:
            raise _damaged(path, f"step {run.step} of {options.steps}, the best {run.best_step}")
        for entry in tensors.values():
            file.verify(entry)
        with torch.no_grad():
            for name, place in model.state_dict(keep_vars=True).items():
                if name in tensors:
                    place.copy_(_read(file, name, place.shape))
            for name, layer in _layers(model):
                if (place := f"{_MOMENTS}order.{name}") in tensors:
                    _disorder_(layer, _checked_order(_read(file, place, layer.s.shape), path, name))
        for name, parameter in _trained(model, state):
            fresh = state.optimizer.state.get(parameter, {})
            moments = {
                key: _read(file, place, fresh[key].shape if key in fresh else parameter.shape).to(parameter.device)
                for kind, key in _names(state).items()
                if (place := f"{_MOMENTS}{kind}.{name}") in tensors
            }
            if missing := fresh.keys() - {*moments, "count"}:
                raise TrainError(
                    f"{path}: lacks {', '.join(sorted(missing))} of {name}, as another version of sctconv left it; "
                    "train its weights on without --resume"
                )
            count = run.counts.get(name, run.step)
            if not isinstance(state.optimizer, torch.optim.AdamW):
                state.optimizer.state[parameter] = {**moments, "count": count}
            elif count:  # AdamW keeps nothing of what it has not moved yet
                state.optimizer.state[parameter] = {**moments, "step": torch.tensor(float(count))}
    return replace(state, step=run.step, best=run.best, best_step=run.best_step, looks=run.looks)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a checkpoint says of its run, see `save_checkpoint`; `identity` is its options and facts, by name."""

    identity: dict[str, Any]
    step: int
    best: float
    best_step: int
    looks: int
    counts: dict[str, int]

    @classmethod
    def parsed(cls, kept: Mapping[str, Any], path: str | os.PathLike[str]) -> _Run:
        """Of JSON that anybody may have written."""

        def get(name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
            value = kept.get(name, default)
            if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
                raise _damaged(path, f"{name} is {value!r:.40}")
            return value

        counts = {str(name): count for name, count in get("counts", dict, {}).items()}
        if any(type(count) is not int or count < 0 for count in counts.values()):
            raise _damaged(path, "counts")
        return cls(
            identity={**get("options", dict), **get("facts", dict)},
            step=get("step", int),
            best=float(get("best", (int, float))),
            best_step=get("best_step", int),
            looks=get("looks", int),
            counts=counts,
        )


def _damaged(path: str | os.PathLike[str], what: str) -> TrainError:
    return TrainError(f"{path}: what it says of its run is damaged ({what}); go on from another checkpoint")


def _read(file: SctFile, name: str, shape: torch.Size) -> Tensor:
    """A copy of a tensor that is to have some shape."""
    entry = file.index.tensors[name]
    if tuple(entry.shape) != tuple(shape):
        raise TrainError(
            f"{file.path}: {name} is {tuple(entry.shape)}, the model's {tuple(shape)}; resume it with the model it began with"
        )
    return mapped_tensor(file, entry).clone()


def _checked_order(order: Tensor, path: str | os.PathLike[str], name: str) -> Tensor:
    if order.is_floating_point() or not torch.equal(order.abs().sort().values, torch.arange(1, len(order) + 1)):
        raise _damaged(path, f"the order of {name}'s columns")
    return order


def _write(
    model: nn.Module,
    source: SctFile,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    state: TrainState | None,
    *,
    overwrite: bool,
) -> None:
    places = dict(model.state_dict(keep_vars=True))
    orders: dict[str, Tensor] = {}
    for name, layer in _layers(model):
        if state is None:
            U, s, V, _ = absorbed(layer.U, layer.s, layer.V)
        else:
            U, s, V, orders[name] = _ordered(layer)
        places |= {f"{name}.U": U, f"{name}.s": s, f"{name}.V": V}
    index = source.index
    with SctWriter(path, overwrite=overwrite, metadata={**index.metadata, **metadata}, extra=index.extra) as out:
        for entry in index.tensors.values():
            if entry.name.startswith(_MOMENTS):
                continue
            dtype = "F32" if state and entry.dtype in FLOATS and entry.name in places else entry.dtype
            out.add_tensor(entry.name, _pieces(source, entry, places), dtype=dtype, shape=entry.shape)
        for name, kind, tensor in _moments(model, state):
            out.add_tensor(f"{_MOMENTS}{kind}.{name}", to_numpy(tensor.cpu()))
        for name, order in orders.items():
            out.add_tensor(f"{_MOMENTS}order.{name}", to_numpy(order))
        for record in index.layers.values():
            if any(parameter.requires_grad for parameter in model.get_submodule(record.name).parameters()):
                record = replace(record, energy=None, error=None, extra={})
            out.add_layer(replace(record, dtype="F32") if state else record)
        for name, file in index.files.items():
            out.add_file(name, source.file(name), extra=file.extra)
        out.commit()


def _layers(model: nn.Module) -> Iterator[tuple[str, SpectralLayer]]:
    """Every spectral layer; of tied ones the first."""
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer) and module.U not in seen:
            seen.add(module.U)
            yield name, module


@torch.no_grad()
def _ordered(layer: SpectralLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, s, V with s descending and not negative, and the order (k,) int32 that they were in."""
    U, s, V = (factor.detach().cpu() for factor in (layer.U, layer.s, layer.V))
    signs = torch.where(s < 0, -1.0, 1.0)
    order = s.abs().argsort(descending=True, stable=True)
    code = ((order + 1) * signs[order].long()).int()
    return (U * signs)[:, order].contiguous(), (s * signs)[order], V[:, order].contiguous(), code


@torch.no_grad()
def _disorder_(layer: SpectralLayer, order: Tensor) -> None:
    """Undoes `_ordered` in place."""
    places, signs = (order.abs() - 1).long(), order.sign()
    U, s, V = (factor.detach().cpu().clone() for factor in (layer.U, layer.s, layer.V))
    for factor, ordered in ((layer.U, U * signs), (layer.s, s * signs), (layer.V, V)):
        moved = torch.empty_like(ordered)
        moved[..., places] = ordered
        factor.copy_(moved)


def _pieces(source: SctFile, entry: TensorEntry, places: Mapping[str, Tensor]) -> Iterator[np.ndarray]:
    """A tensor of the model; one that the model has no place for as it stands in the file."""
    if entry.name in places:
        yield to_numpy(places[entry.name].detach().cpu())
        return
    for piece in source.pieces(entry):
        yield np.frombuffer(piece, numpy_dtype(entry.dtype))


def _moments(model: nn.Module, state: TrainState | None) -> Iterator[tuple[str, str, Tensor]]:
    if state is None:
        return
    for name, parameter in _trained(model, state):
        moments = state.optimizer.state.get(parameter, {})
        yield from ((name, kind, moments[key]) for kind, key in _names(state).items() if key in moments)


def _counts(model: nn.Module, state: TrainState) -> Iterator[tuple[str, int]]:
    """How often each parameter was moved: fewer times than the steps, if some gave it no gradient."""
    for name, parameter in _trained(model, state):
        moments = state.optimizer.state.get(parameter, {})
        yield name, int(moments.get("count", moments.get("step", 0)))  # AdamW's name for it


def _trained(model: nn.Module, state: TrainState) -> Iterator[tuple[str, nn.Parameter]]:
    moving = {id(parameter) for group in state.optimizer.param_groups for parameter in group["params"]}
    return ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) in moving)


def _names(state: TrainState) -> dict[str, str]:
    """Our names of the moments -> the optimiser's."""
    if isinstance(state.optimizer, torch.optim.AdamW):
        return {"first": "exp_avg", "second": "exp_avg_sq"}
    return {"first": "first", "first_scale": "first_scale", "second_rows": "second_rows", "second": "second"}
