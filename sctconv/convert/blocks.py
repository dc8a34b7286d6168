"""A decoder seen as embedding, blocks and head, found by its structure, so that one block at a time can be run.

Nothing here knows the name of an architecture: the blocks are the module list that holds the layers to be factored, and
what each is called with is recorded from a pass of the model itself with recorders in place of its blocks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from sctconv.errors import OptionError
from sctconv.formats.checkpoint import read_tensor
from sctconv.runtime.model import assign_
from sctconv.runtime.tensors import to_torch
from sctconv.sources.weights import DenseModel


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
    """One dense block with its weights, float32.

    Attributes:
        name: its path in the model.
        args, kwargs: what the model calls it with besides the hidden state.
        groups: the layers to be factored, by their path in the block; those with the same input stand together, in the
            order of execution. Layers that are not run exactly once on all tokens (experts) are not among them.
        writers: those of them that write to the residual stream.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    groups: list[list[str]] = field(default_factory=list)
    writers: dict[str, Writer] = field(default_factory=dict)

    def run(self, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """The hidden state (batch, context, width) after the block, or after another version of it."""
        return _hidden((module or self.module)(hidden, *self.args, **self.kwargs))

    def student(self) -> nn.Module:
        """A copy of the module tree on the same parameters, whose layers may be replaced."""
        shared = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return copy.deepcopy(self.module, memo=shared)


class Decoder:
    """A dense checkpoint run block by block, one block's weights in memory at a time, in float32.

    Args:
        model: the checkpoint.
        layers: paths of the layers to be factored. `layers` keeps those within the blocks.

    Raises:
        OptionError: none of them is in a block.
    """

    def __init__(self, model: DenseModel, layers: Sequence[str]) -> None:
        self._dense = model
        self._skeleton = model.skeleton
        lists = [name for name, module in self._skeleton.named_modules() if isinstance(module, nn.ModuleList)]
        held = {name: [layer for layer in layers if layer.startswith(f"{name}.")] for name in lists}
        # an inner list (of experts) holds fewer; of two that hold the same, the outer one is the shorter path
        self.path: Final = max(held, key=lambda name: (len(held[name]), -len(name)), default="")
        if not held.get(self.path):
            raise OptionError(
                "none of the selected layers is in a decoder block, where calibration works; use --data-free"
            )
        self.layers: Final = held[self.path]
        self._count = len(self._skeleton.get_submodule(self.path))
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The hidden states before the first block: (batch, context, width) float32 for each (batch, context) of tokens.

        All batches have one shape, as what else the blocks are called with (masks, rotary angles) is kept from the last.
        """
        top, recorders = self._top()
        recorders[0].probe = self._load(0)
        states = []
        for batch in batches:
            top(input_ids=batch, use_cache=False)
            states.append(recorders[0].hidden)
        self._calls = [(recorder.args, recorder.kwargs) for recorder in recorders]
        return states

    @torch.no_grad()
    def head(self, states: Sequence[Tensor], batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits (batch, context, vocabulary) float32 for hidden states after the last block."""
        top, recorders = self._top()
        recorders[0].probe = self._load(0)
        for state, batch in zip(states, batches, strict=True):
            recorders[-1].replacement = state
            yield top(input_ids=batch, use_cache=False).logits.float()

    def block(self, place: int, hidden: Tensor) -> Block:
        """Loads a block and finds out, on one batch of hidden states, which of its layers do what."""
        name = f"{self.path}.{place}"
        args, kwargs = self._calls[place]
        block = Block(name, self._load(place), args, kwargs)
        layers = [layer.removeprefix(f"{name}.") for layer in self.layers if layer.startswith(f"{name}.")]
        block.groups = _find_groups(block, hidden, layers)
        block.writers = _find_writers(block, hidden)
        return block

    def _top(self) -> tuple[Any, list[_Recorder]]:
        """The model with its own weights outside the blocks and recorders for blocks."""
        top = copy.deepcopy(self._skeleton)
        recorders = [_Recorder() for _ in range(self._count)]
        for recorder in recorders[1:]:
            recorder.first = recorders[0]
        parent, _, child = self.path.rpartition(".")
        setattr(top.get_submodule(parent), child, nn.ModuleList(recorders))
        names = [name for name in self._dense.tensors if not name.startswith(f"{self.path}.")]
        tensors = ((name, to_torch(read_tensor(self._dense, name))) for name in names)
        assign_(top, tensors, source=self._dense.source.label, dtype=torch.float32)
        return top.eval(), recorders

    def _load(self, place: int) -> nn.Module:
        prefix = f"{self.path}.{place}."
        module: nn.Module = copy.deepcopy(self._skeleton.get_submodule(prefix[:-1]))
        names = [name for name in self._dense.tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): to_torch(read_tensor(self._dense, name)) for name in names}
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        module.load_state_dict(floats, strict=False, assign=True)
        return module.eval().requires_grad_(False)


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and returns its input in the block's own kind of output."""

    probe: nn.Module | None = None
    first: _Recorder | None = None
    replacement: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        if self.probe is not None:
            output = self.probe(hidden, *args, **kwargs)
            self.rest = output[1:] if isinstance(output, tuple) else None
            self.probe = None
        rest = (self.first or self).rest
        hidden = hidden if self.replacement is None else self.replacement
        return hidden if rest is None else (hidden, *rest)

    def __getattr__(self, name: str) -> Any:
        # models ask their blocks for attributes (attention_type, layer_idx); a recorder has none worth having
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return None


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


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
    """What passed: the first argument of some submodules and the output of others, of the last forward pass."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def tapped(module: nn.Module, inputs: Collection[str], outputs: Collection[str] = ()) -> Iterator[Taps]:
    """Within, every forward pass of a module is tapped at these submodules."""
    taps = Taps()

    def before(name: str) -> Callable[..., None]:
        return lambda args: taps.inputs.__setitem__(name, args[0])

    def after(name: str) -> Callable[..., None]:
        return lambda output: taps.outputs.__setitem__(name, output)

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
def _find_groups(block: Block, hidden: Tensor, layers: list[str]) -> list[list[str]]:
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
def _find_writers(block: Block, hidden: Tensor) -> dict[str, Writer]:
    """Moves a layer's output by some noise and looks where, last of all places, exactly that noise arrives.

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
