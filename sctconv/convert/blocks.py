"""A decoder block: which of its layers have one input, which write to the residual stream, and taps on what passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sctconv.runtime.precision import products


@dataclass(frozen=True)
class Writer:
    """How a layer writes to the residual stream: `z = r + scale * output`, where r does not depend on the output.

    Attributes:
        place: path of the module whose first argument is z; "" for the block's own output.
        scale: what the output is multiplied with before it is added.
    """

    place: str
    scale: float


@dataclass
class Block:
    """One block with its weights, float32; dense until a student's layers take their place in it.

    Attributes:
        name: its path in the model.
        args, kwargs: what the model calls it with besides the hidden state.
        groups: the layers to be fitted, by their path in the block; those with the same input stand together, in the
            order of execution. Layers that are not run exactly once on all tokens (experts) are not among them.
        writers: those of them that write to the residual stream.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    groups: list[list[str]] = field(default_factory=list)
    writers: dict[str, Writer] = field(default_factory=dict)

    def run(self, hidden: Tensor, *, bf16: bool = False) -> Tensor:
        """The hidden state (batch, context, width) float32 after the block."""
        with products(hidden.device, bf16):
            return hidden_of(self.module(hidden, *self.args, **self.kwargs)).float()

    def weight(self, name: str) -> Tensor:
        """W (out, in) of one of its dense layers, however that stores it."""
        layer: Any = self.module.get_submodule(name)
        W: Tensor = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        return W.detach()


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returns."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


@contextlib.contextmanager
def hooked(
    module: nn.Module, hooks: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]]
) -> Iterator[None]:
    """Within, each named submodule calls `before(args)` and `after(output)`, whose result replaces the output if any."""
    handles = []
    for name, (before, after) in hooks.items():
        child = module.get_submodule(name)
        if before is not None:
            handles.append(child.register_forward_pre_hook(_before(before)))
        if after is not None:
            handles.append(child.register_forward_hook(_after(after)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Taps:
    """What passed in the last forward pass, in float32: the first argument of some submodules and the output of others."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Passed(Exception):  # noqa: N818 (ends a forward pass early)
    """All that is wanted of a forward pass has been seen."""


@contextlib.contextmanager
def tapped(
    module: nn.Module, inputs: Collection[str], outputs: Collection[str] = (), until: str = ""
) -> Iterator[Taps]:
    """Within, every forward pass of a module is tapped at these submodules, and ends with `Passed` at the one `until`."""
    taps = Taps()

    def before(name: str) -> Callable[..., None]:
        def tap(args: tuple[Any, ...]) -> None:
            taps.inputs[name] = args[0].float()
            if name == until:
                raise Passed

        return tap

    def after(name: str) -> Callable[..., None]:
        return lambda output: taps.outputs.__setitem__(name, output.float())

    names = dict.fromkeys([*inputs, *outputs])
    hooks = {
        name: (before(name) if name in inputs else None, after(name) if name in outputs else None) for name in names
    }
    with hooked(module, hooks):
        yield taps


def _before(call: Callable[..., Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        call(args)

    return hook


def _after(call: Callable[..., Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return call(output)

    return hook


@torch.no_grad()
def find_groups(block: Block, hidden: Tensor, layers: list[str]) -> list[list[str]]:
    """Those of some layers that run once on all tokens, by their inputs, in the order of execution; see `Block.groups`."""
    calls: list[tuple[str, Tensor]] = []
    hooks = {name: ((lambda args, name=name: calls.append((name, args[0]))), None) for name in layers}
    with hooked(block.module, hooks):  # type: ignore[arg-type]
        block.run(hidden)
    names = [name for name, _ in calls]
    tokens = hidden.shape[:-1].numel()
    once = [(name, x) for name, x in calls if names.count(name) == 1 and x.shape[:-1].numel() == tokens]
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in once:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [names for _, names in groups]


@torch.no_grad()
def find_writers(block: Block, hidden: Tensor) -> dict[str, Writer]:
    """Which layers of a block's groups write to the residual stream, and how.

    Moves a layer's output by some noise and looks where, last of all places, exactly that noise arrives.

    The input of a norm after the addition, or the block's output, moves by the noise times a number; behind a norm or an
    activation it does not.
    """
    base = _observe(block, hidden, None, None)
    writers = {}
    generator = torch.Generator().manual_seed(0)
    for name in (name for group in block.groups for name in group):
        shape = base[f"{name} output"].shape
        noise = torch.randn(shape, generator=generator) * base[f"{name} output"].std()
        moved = _observe(block, hidden, name, noise)
        for place in reversed(moved):  # in the order of execution
            if place.endswith(" output") or moved[place].shape != shape or place == name:
                continue
            change = (moved[place] - base[place]).double()
            scale = float((change * noise).sum() / noise.double().square().sum())
            rest = base[place] - scale * base[f"{name} output"]  # nothing, where the place is but the next module
            arrives = abs(scale) > 1e-3 and float((change - scale * noise).norm()) < 1e-3 * float(change.norm())
            if arrives and float(rest.norm()) > 1e-3 * float(base[place].norm()):
                writers[name] = Writer(place, scale)
                break
    return writers


def _observe(block: Block, hidden: Tensor, moved: str | None, noise: Tensor | None) -> dict[str, Tensor]:
    """The first argument of every module of a block, and the output of every layer and of the block (as "")."""
    seen: dict[str, Tensor] = {}
    layers = {name for group in block.groups for name in group}

    def keep(name: str) -> Callable[..., Any]:
        def before(args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen[name] = args[0].clone()

        return before

    def output(name: str) -> Callable[..., Any]:
        def after(value: Any) -> Any:
            seen[f"{name} output"] = value.clone()
            return value + noise if name == moved else None

        return after

    names = [name for name, _ in block.module.named_modules() if name]
    with hooked(block.module, {name: (keep(name), output(name) if name in layers else None) for name in names}):
        result = block.run(hidden)
    seen.pop("", None)
    seen[""] = result.clone()
    return seen
