"""A decoder seen as embedding, blocks and head, found by its structure, so that one block at a time can be run.

Nothing here knows the name of an architecture: the blocks are the module list that holds the layers to be factored, and
what each is called with is recorded from a pass of the model itself with recorders in place of its blocks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sctconv.errors import OptionError
from sctconv.formats.checkpoint import read_tensor
from sctconv.formats.dtypes import numpy_dtype
from sctconv.runtime.model import assign_
from sctconv.runtime.skeleton import linear_layers
from sctconv.runtime.tensors import to_torch
from sctconv.sources.weights import DenseModel

from .blocks import Block, Writer, find_groups, find_writers
from .states import States

_LOGITS: Final = 64 << 20
"""Bytes of the logits that are held at once."""

_COPIES: Final = 7
"""How many tensors like them there are at most while they are used."""

_ROWS: Final = 8192
"""Rows of the output layer that are multiplied at once."""


class Decoder:
    """A dense checkpoint run block by block, one block's weights in memory at a time, in float32.

    Args:
        model: the checkpoint.
        layers: paths of the layers to be factored; `layers` keeps those within the blocks.
        others: paths of further layers to be looked for in the blocks; `others` keeps those within.
        device: where blocks are run.

    Raises:
        OptionError: none of `layers` is in a block.
    """

    def __init__(
        self,
        model: DenseModel,
        layers: Sequence[str],
        others: Sequence[str] = (),
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._dense = model
        self._skeleton = model.skeleton
        self.device: Final = torch.device(device)
        lists = [name for name, module in self._skeleton.named_modules() if isinstance(module, nn.ModuleList)]
        held = {name: [layer for layer in layers if layer.startswith(f"{name}.")] for name in lists}
        # an inner list (of experts) holds fewer; of two that hold the same, the outer one is the shorter path
        self.path: Final = max(held, key=lambda name: (len(held[name]), -len(name)), default="")
        if not held.get(self.path):
            raise OptionError(
                "none of the selected layers is in a decoder block, where calibration works; use --data-free"
            )
        self.layers: Final = held[self.path]
        self.others: Final = [layer for layer in others if layer.startswith(f"{self.path}.")]
        self._count = len(self._skeleton.get_submodule(self.path))
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._known: dict[int, tuple[list[list[str]], dict[str, Writer]]] = {}  # groups and writers of each block
        self._rest: list[Any] = []  # what a block returns besides the hidden state

    def __len__(self) -> int:
        return self._count

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block in float32."""
        return 4 * max(sum(p.numel() for p in block.parameters()) for block in self._skeleton.get_submodule(self.path))

    @property
    def head_bytes(self) -> int:
        """Bytes of the output layer as the checkpoint has it, and of what is made with it at once."""
        output = self._skeleton.get_output_embeddings()
        weight = self._dense.tensors[self._weight(_path(self._skeleton, output))] if type(output) is nn.Linear else None
        stored = weight.size * numpy_dtype(weight.dtype).itemsize if weight else 0
        return stored + 4 * min(_ROWS, self._vocabulary) * self.width + _COPIES * _LOGITS

    @property
    def _vocabulary(self) -> int:
        return int(self._skeleton.config.get_text_config().vocab_size)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of the layers in `layers` and `others`."""
        shapes = linear_layers(self._skeleton)
        return [(shapes[name].out, shapes[name].in_) for name in (*self.layers, *self.others)]

    @property
    def width(self) -> int:
        """Entries of a hidden state."""
        embedding = self._skeleton.get_input_embeddings()
        return (
            int(self._skeleton.config.get_text_config().hidden_size) if embedding is None else embedding.weight.shape[1]
        )

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The hidden states before the first block: (batch, context, width) float32 for each (batch, context) of tokens.

        All batches have one shape, as what else the blocks are called with (masks, rotary angles) is kept from the last.
        """
        top, recorders = self._top(batches, head=False)
        recorders[0].probes.append(self._load(0))
        for batch in batches:
            with contextlib.suppress(_End):
                top(input_ids=batch.to(self.device), use_cache=False)
            yield recorders[0].hidden
        self._calls = [(recorder.args, recorder.kwargs) for recorder in recorders]

    @torch.no_grad()
    def head(self, states: Iterable[Tensor], batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits (batch, context, vocabulary) float32 for hidden states after the last block; see `parts`."""
        top, recorders = self._top(batches, head=True)
        for state, batch in zip(states, batches, strict=True):
            recorders[-1].replacement = state.to(self.device)
            yield top(input_ids=batch.to(self.device), use_cache=False).logits.float()

    def head_gradients(self, states: States, batches: Sequence[Tensor]) -> States:
        """In place of the hidden states after the last block, the gradient there of the next tokens' cross-entropy, summed."""
        top, recorders = self._top(batches, head=True)
        for number, batch in enumerate(batches):
            batch, state = batch.to(self.device), states[number].to(self.device)
            gradient = torch.zeros_like(state)
            for place in self.parts(len(batch), batch.shape[1] - 1):
                part = state[:, place].detach().requires_grad_()
                recorders[-1].replacement = part
                with torch.enable_grad():
                    logits = top(input_ids=batch[:, place], use_cache=False).logits.float()
                    targets = batch[:, 1:][:, place]
                    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
                assert part.grad is not None
                gradient[:, place] = part.grad
            states[number] = gradient
        return states

    def parts(self, windows: int, tokens: int) -> list[slice]:
        """Places in some windows, in order, whose logits are few enough to be held at once: each token has its own."""
        step = max(1, _LOGITS // (4 * self._vocabulary * windows))
        return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]

    def block(self, place: int, hidden: Tensor | None) -> Block:
        """Loads a block and finds out, given one batch of hidden states, which of its layers do what."""
        name = f"{self.path}.{place}"
        args, kwargs = self._calls[place]
        block = Block(name, self._load(place), args, kwargs)
        if hidden is None:
            return block
        if place not in self._known:
            wanted = {layer.removeprefix(f"{name}.") for layer in (*self.layers, *self.others)}
            layers = [path for path, _ in block.module.named_modules() if path in wanted]
            self._known[place] = find_groups(block, hidden := hidden.to(self.device), layers), {}
            block.groups = self._known[place][0]
            self._known[place][1].update(find_writers(block, hidden))
        block.groups, block.writers = self._known[place]
        return block

    def _top(self, batches: Sequence[Tensor], *, head: bool) -> tuple[Any, list[_Recorder]]:
        """The model with its own weights outside the blocks and recorders for blocks.

        Of the embedding only the rows that the batches ask for, and of the head, where it is wanted, its own dtype, as
        either may be larger than a block.
        """
        top = copy.deepcopy(self._skeleton)
        embedding, output = top.get_input_embeddings(), top.get_output_embeddings()
        names = [name for name in self._dense.tensors if not name.startswith(f"{self.path}.")]
        if type(output) is nn.Linear:
            path = _path(top, output)
            weight, bias = self._weight(path), f"{path}.bias" if output.bias is not None else None
            kept = (to_torch(read_tensor(self._dense, name)) if head and name else None for name in (weight, bias))
            top.set_output_embeddings(_Head(*kept))
            names = [name for name in names if name not in (weight, bias)]
        if isinstance(embedding, nn.Embedding):
            weight = self._weight(_path(top, embedding))
            names = [name for name in names if name != weight]
            _keep_rows_(embedding, self._dense, weight, torch.cat([batch.flatten() for batch in batches]).unique())
        top.all_tied_weights_keys = {}
        recorders = [_Recorder(self._rest) for _ in range(self._count)]
        recorders[-1].is_end = not head
        parent, _, child = self.path.rpartition(".")
        setattr(top.get_submodule(parent), child, nn.ModuleList(recorders))
        tensors = ((name, to_torch(read_tensor(self._dense, name))) for name in names)
        assign_(top, tensors, source=self._dense.source.label, dtype=torch.float32, device=self.device)
        return top.eval().requires_grad_(False), recorders

    def _weight(self, path: str) -> str:
        """The checkpoint's name for a module's weight, which may be there only under the name that it is tied to."""
        name = f"{path}.weight"
        if name in self._dense.tensors:
            return name
        tied = self._skeleton.all_tied_weights_keys
        return next((b if a == name else a) for a, b in tied.items() if name in (a, b))

    def _load(self, place: int) -> nn.Module:
        prefix = f"{self.path}.{place}."
        module: nn.Module = copy.deepcopy(self._skeleton.get_submodule(prefix[:-1]))
        names = [name for name in self._dense.tensors if name.startswith(prefix)]
        tensors = {}
        for name in names:
            tensor = to_torch(read_tensor(self._dense, name))
            tensors[name.removeprefix(prefix)] = tensor.float() if tensor.is_floating_point() else tensor
        module.load_state_dict(tensors, strict=False, assign=True)
        return module.eval().requires_grad_(False).to(self.device)


class _End(Exception):  # noqa: N818 (ends a forward pass early)
    """The last block has been reached."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and returns its input in the block's own kind of output.

    Args:
        rest: shared by all: filled by the one that has a real block to probe, with what that returns besides its state.
    """

    replacement: Tensor | None = None
    is_end = False

    def __init__(self, rest: list[Any]) -> None:
        super().__init__()
        self.rest = rest
        self.probes: list[nn.Module] = []  # in a list, so that it is no part of the model

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        if self.probes:
            output = self.probes.pop()(hidden, *args, **kwargs)
            self.rest[:] = [output[1:] if isinstance(output, tuple) else None]
        if self.is_end:
            raise _End
        hidden = hidden if self.replacement is None else self.replacement
        return hidden if self.rest[0] is None else (hidden, *self.rest[0])

    def __getattr__(self, name: str) -> Any:
        # models ask their blocks for attributes (attention_type, layer_idx); a recorder has none worth having
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return None


class _Head(nn.Module):
    """The output layer with its weight (vocabulary, width) in the checkpoint's dtype, multiplied in float32 by parts."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.kept, self.bias = weight, bias  # no parameter: nothing else is to fill it

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.kept is not None
        logits: Tensor = _ByParts.apply(hidden, self.kept)
        return logits if self.bias is None else logits + self.bias.to(hidden)


class _ByParts(torch.autograd.Function):
    """hidden @ W^T and its gradient for the hidden state, with W (vocabulary, width) cast a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor) -> Tensor:
        ctx.W = W
        return torch.cat([F.linear(hidden, rows.to(hidden)) for rows in W.split(_ROWS)], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        parts = zip(gradient.split(_ROWS, -1), ctx.W.split(_ROWS), strict=True)
        return sum((part @ rows.to(part) for part, rows in parts), torch.zeros(())), None


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, child in model.named_modules() if child is module)


def _keep_rows_(embedding: nn.Embedding, dense: DenseModel, name: str, ids: Tensor) -> None:
    """Gives an embedding the rows of some ids (sorted) alone, and translates what it is asked for."""
    width = embedding.weight.shape[1]
    rows = torch.empty(len(ids), width)
    first = done = 0  # entries of the tensor so far; rows so far
    partial: np.ndarray | None = None
    for chunk in dense.chunks(name):
        flat = chunk.reshape(-1)
        if partial is not None:
            flat = np.concatenate([partial, flat])
        count = flat.size // width
        wanted = ids[(ids >= first) & (ids < first + count)]
        part = to_torch(np.ascontiguousarray(flat[: count * width].reshape(count, width)))
        rows[done : done + len(wanted)] = part[wanted - first].float()
        done, first, partial = done + len(wanted), first + count, flat[count * width :]
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    embedding.padding_idx = None  # of gradients only
    embedding.register_forward_pre_hook(
        lambda module, args: (torch.searchsorted(ids.to(args[0].device), args[0].contiguous()),)
    )
