"""Activations of a block computed again from its output: the backward pass finds rank-k states where hidden ones would be.

A block adds to its input what its attention and its MLP end in, two factored layers: `y = x + A(h_A) + B(h_B)` with
`A(h) = (h * s) U^T` and h (tokens, k) what is between the factors. So x follows from y and the two h, and only these are kept
of a block, with one y for the whole model: at rank 32 and width 8192 a 128th of what checkpoints of the inputs take, and as
many products. Sums are float32, so x comes back to rounding, and no further off than the sum of the blocks' roundings.

(As in reversible networks, Gomez et al., arXiv 1707.04585, but for any residual block, at the price of the h.)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..memory import release_free
from ..spectral import SpectralLinear
from .gated import Gated
from .options import TrainError

_RELEASED: Final = 8
"""Blocks after which the holes between what is held go back to the system: they add up over many blocks."""
_NEAR: Final = 1e-4
"""Largest distance of a recovered input, over the input's largest entry, at which a block counts as such a sum."""


@contextlib.contextmanager
def reversing(model: Any) -> Iterator[None]:
    """Within, a model's blocks keep only what the module says; its hidden states between blocks are float32.

    Raises:
        TrainError: the model has no list of blocks, or one of them is, on its first pass, no such sum.
    """
    blocks = model_blocks(model)
    if not blocks:
        raise TrainError("--checkpointing factors: the model has no list of blocks; use --checkpointing blocks")
    ranks = [module.rank for module in model.modules() if isinstance(module, SpectralLinear)]
    stream = _Stream(len(blocks), max(ranks, default=0))
    for place, block in enumerate(blocks):
        block.forward = _Block(block, stream, place).forward
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def model_blocks(model: Any) -> list[nn.Module]:
    """The blocks of a model's backbone, in order; none where it has no list of them."""
    return list(next((child for child in model.base_model.children() if isinstance(child, nn.ModuleList)), []))


def try_blocks(model: Any) -> None:
    """Sends three tokens through a model within `reversing`, by which its blocks find what they end in.

    Raises:
        TrainError: one is no such sum.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = (
        torch.arange(1, 4, device=next(model.parameters()).device)[None] * vocabulary // 4
    )  # one of padding is nothing
    with torch.enable_grad():
        model.base_model(input_ids=ids, use_cache=False)


def is_reversible(model: Any) -> bool:
    """Whether all blocks are such sums."""
    try:
        with reversing(model):
            try_blocks(model)
    except TrainError:
        return False
    return True


class _Stream:
    """The hidden states that the backward pass has come to, and room for what the forward pass keeps.

    The room is one piece: kept one by one, small tensors would lie in the holes that a block's large ones leave, which the
    next block's then do not fit.

    Args:
        blocks: of the model; rank: largest of their layers.
    """

    def __init__(self, blocks: int, rank: int) -> None:
        self.state: Tensor | None = None
        self._most = 2 * blocks * rank
        self._room, self._used = torch.empty(0), 0

    def keep(self, between: list[Tensor], *, first: bool) -> list[Tensor]:
        """The same in the room, which is a new one where a forward pass begins."""
        if first:
            tokens = between[0].shape[:-1].numel()
            self._room, self._used = (
                torch.empty(self._most * tokens, dtype=between[0].dtype, device=between[0].device),
                0,
            )
        kept = []
        for h in between:
            place = self._room.data[self._used : self._used + h.numel()].view(h.shape)
            kept.append(place.copy_(h))
            self._used += h.numel()
        return kept


class _Block:
    """Stands before a block's own forward."""

    def __init__(self, block: Any, stream: _Stream, place: int) -> None:
        self.run, self.stream, self.place = block.forward, stream, place
        self.candidates = [module for module in block.modules() if isinstance(module, SpectralLinear)]
        self.ends: list[SpectralLinear] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            output: Tensor = self.run(x, *args, **kwargs)
            return output
        x = x.float()
        if not x.requires_grad:  # nothing before this block is trained, but the block is
            x = x.detach().requires_grad_()
        result: Tensor = _Reversal.apply(x, self, args, kwargs)
        return result

    def release(self) -> None:
        """After every few blocks."""
        if self.place % _RELEASED == _RELEASED - 1:
            release_free()

    def traced(self, x: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """The block's output, and what is between the factors of the layers that it ends in."""
        between: dict[SpectralLinear, Tensor] = {}

        def keeping(layer: SpectralLinear) -> Any:
            def narrowed(inputs: Any) -> Tensor:
                between[layer] = inputs @ layer.V
                return between[layer]

            return narrowed

        layers = self.candidates if self.ends is None else self.ends
        with _instead({layer: {"narrowed": keeping(layer)} for layer in layers}):
            y = self.run(x, *args, **kwargs)
        if self.ends is None:
            self.ends = self._found(x, y, between)
        return y, [between[layer] for layer in self.ends]

    def again(self, x: Tensor, known: list[tuple[Tensor, Tensor]], args: Any, kwargs: Any) -> Tensor:
        """The block's output for autograd to go back from; of the layers it ends in, h and what they give are known."""
        assert self.ends is not None

        def knowing(layer: SpectralLinear, h: Tensor, output: Tensor) -> dict[str, Any]:
            def narrowed(inputs: Tensor | Gated) -> Tensor:
                if isinstance(inputs, Gated):
                    return inputs.narrowed(layer.V, h)
                narrow: Tensor = _Narrowed.apply(h, inputs.to(h.dtype), layer.V)
                return narrow

            def widened(state: Tensor) -> Tensor:
                wide: Tensor = _Widened.apply(output, layer.scaled(state), layer.U, layer.bias)
                return wide

            return {"narrowed": narrowed, "widened": widened}

        with _instead({layer: knowing(layer, *both) for layer, both in zip(self.ends, known, strict=True)}):
            y: Tensor = self.run(x, *args, **kwargs)
        return y

    def _found(self, x: Tensor, y: Tensor, between: dict[SpectralLinear, Tensor]) -> list[SpectralLinear]:
        wide = [layer for layer in between if layer.out_features == x.shape[-1]]
        for pair in itertools.combinations(wide, 2):
            back, _ = recovered(y, pair, [between[layer] for layer in pair])
            if float((back - x).abs().max()) <= _NEAR * float(x.abs().max()):
                return list(pair)
        raise TrainError(
            f"--checkpointing factors: block {self.place} does not add what two factored layers give to its input; use "
            "--checkpointing blocks"
        )


def recovered(y: Tensor, layers: Any, between: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """`y - sum of (h * s) U^T + b`, float32, and the terms of that sum."""
    x, terms = y.float(), []
    for layer, h in zip(layers, between, strict=True):
        terms.append(layer.widened(h))
        x = x - terms[-1]
    return x, terms


@contextlib.contextmanager
def _instead(methods: dict[SpectralLinear, dict[str, Any]]) -> Iterator[None]:
    """Within, layers have these methods in place of their own."""
    for layer, its in methods.items():
        layer.__dict__.update(its)
    try:
        yield
    finally:
        for layer, its in methods.items():
            for name in its:
                del layer.__dict__[name]


class _Narrowed(torch.autograd.Function):
    """h = x V that is known: only the way back."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, V: Tensor) -> Tensor:
        ctx.save_for_backward(x, V)
        return h.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, V = ctx.saved_tensors
        dh, needed = gradients[0], ctx.needs_input_grad
        dx = dh @ V.to(dh.dtype).T if needed[1] else None
        dV = (x.flatten(0, -2).T @ dh.flatten(0, -2)).to(V.dtype) if needed[2] else None
        return None, dx, dV


class _Widened(torch.autograd.Function):
    """y = z U^T + b that is known: only the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, U)
        ctx.kind = None if bias is None else bias.dtype
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, U = ctx.saved_tensors
        dy, needed = gradients[0], ctx.needs_input_grad
        dz = dy @ U.to(dy.dtype) if needed[1] else None
        dU = (dy.flatten(0, -2).T @ z.flatten(0, -2)).to(U.dtype) if needed[2] else None
        db = dy.flatten(0, -2).sum(0).to(ctx.kind) if needed[3] else None
        return None, dz, dU, db


def _autocast(tensor: Tensor, enabled: bool, dtype: torch.dtype) -> Any:
    return torch.autocast(tensor.device.type, dtype, enabled=enabled, cache_enabled=False)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: _Block, args: Any, kwargs: Any) -> Tensor:
        with torch.no_grad():
            y, between = block.traced(x, args, kwargs)
        ctx.block, ctx.args, ctx.kwargs = block, args, kwargs
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        ctx.save_for_backward(*block.stream.keep(between, first=block.place == 0))
        block.stream.state = y
        block.release()
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        block: _Block = ctx.block
        assert block.stream.state is not None and block.ends is not None
        with torch.no_grad(), _autocast(gradients[0], *ctx.autocast):
            x, terms = recovered(block.stream.state, block.ends, list(ctx.saved_tensors))
        block.stream.state = x
        with torch.enable_grad(), _autocast(gradients[0], *ctx.autocast):
            leaf = x.detach().requires_grad_()
            y = block.again(leaf, list(zip(ctx.saved_tensors, terms, strict=True)), ctx.args, ctx.kwargs)
        torch.autograd.backward(y, gradients[0])
        block.release()
        return leaf.grad, None, None, None
