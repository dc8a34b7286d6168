"""A gated MLP of factored layers, a slice of its width at a time: what is as wide as `intermediate` is never whole.

`down(act(gate(x)) * up(x))` is, between down's factors, `h = (act(z_g U_g^T) * (z_u U_u^T)) V_d` with z = (x V) * s of gate
and up, (tokens, k). Rows of U_g, U_u and V_d belong together, so h is a sum over slices of them, each of which stays in a
cache. The backward pass finds both z and makes each slice again: two products more, where three tensors (tokens,
intermediate) would have to be kept, and written and read a dozen times.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..spectral import SpectralLinear

_CACHED: Final = 1 << 19
_ELSEWHERE: Final = 1 << 24
"""Entries (tokens x rows) of a slice on a processor, and on other devices, which want large products."""

_POINTWISE: Final = (nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Mish)

Activation = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def in_slices(model: nn.Module) -> Iterator[None]:
    """Within, the gated MLPs of a model whose three layers are factored are computed in slices."""
    found = [(module, parts) for module in model.modules() if (parts := _parts(module))]
    for module, (gate, up, down, activation) in found:
        module.forward = _forward(gate, up, down, activation)
    try:
        yield
    finally:
        for module, _ in found:
            module.__dict__.pop("forward", None)


class Gated:
    """`act(z_g U_g^T + b_g) * (z_u U_u^T + b_u)`, (tokens, intermediate), yet to be computed: what `down` is called with.

    Args:
        halves: z of gate and of up, (..., k), each with its layer.
        activation: of the first.
    """

    def __init__(self, halves: list[tuple[Tensor, SpectralLinear]], activation: Activation) -> None:
        self._halves, self._activation = halves, activation

    def narrowed(self, V: Tensor, known: Tensor | None = None) -> Tensor:
        """Its product with V (intermediate, k); `known` where that is there and only the way back is wanted."""
        tensors = [tensor for z, layer in self._halves for tensor in (z, layer.U, layer.bias)]
        product: Tensor = _Slices.apply(known, self._activation, V, *tensors)
        return product

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.narrowed(V)


class _Leaves(fx.Tracer):
    """Looks into no module but the one it is given."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _parts(module: nn.Module) -> tuple[SpectralLinear, SpectralLinear, SpectralLinear, Activation] | None:
    """gate, up, down and activation of a module that computes that and nothing else, by its own code."""
    children = dict(module.named_children())
    if sum(isinstance(child, SpectralLinear) for child in children.values()) != 3:
        return None
    try:
        graph = _Leaves().trace(module)
    except Exception:  # code that depends on values
        return None

    def called(node: Any) -> tuple[Any, Any]:
        """The child that a node calls, and what with."""
        is_call = isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return (children.get(str(node.target)), node.args[0]) if is_call else (None, None)

    *_, output = graph.nodes
    down, product = called(output.args[0])
    if not isinstance(product, fx.Node) or product.target is not operator.mul or len(product.args) != 2:
        return None
    for first, second in (product.args, product.args[::-1]):
        (activation, inner), (up, x) = called(first), called(second)
        gate, same = called(inner)
        layers = (gate, up, down)
        is_whole = isinstance(x, fx.Node) and x.op == "placeholder" and x is same
        if is_whole and all(isinstance(layer, SpectralLinear) for layer in layers) and _is_pointwise(activation):
            return gate, up, down, activation
    return None


def _is_pointwise(activation: Any) -> bool:
    is_known = isinstance(activation, _POINTWISE) or type(activation).__module__ == "transformers.activations"
    return is_known and next(activation.parameters(), None) is None  # xIELU learns


def _forward(gate: SpectralLinear, up: SpectralLinear, down: SpectralLinear, activation: Activation) -> Any:
    """What stands before an MLP's own forward."""

    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once for both
        output: Tensor = down(Gated([(layer.scaled(layer.narrowed(x)), layer) for layer in (gate, up)], activation))
        return output

    return forward


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: Tensor | None, activation: Activation, V: Tensor, *halves: Tensor | None) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(V, *halves)
        if known is not None:
            return known.detach()
        z = halves[0]
        assert z is not None
        h = torch.zeros(z.shape[:-1].numel(), V.shape[1], device=z.device)
        for rows in _slices(z, V):
            g, u = (_wide(half, rows) for half in _pairs(halves))
            h += (activation(g) * u).to(z.dtype) @ V[rows].to(z.dtype)
        return h.to(z.dtype).view(*z.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        V, *halves = ctx.saved_tensors
        z = halves[0]
        dh = gradients[0].reshape(-1, V.shape[1]).to(z.dtype)
        wanted = _Gradients(V, halves, ctx.needs_input_grad[2:])
        for rows in _slices(z, V):
            wide = [_wide(half, rows).requires_grad_() for half in _pairs(halves)]
            with torch.enable_grad():
                a = ctx.activation(wide[0]) * wide[1]
            da = dh @ V[rows].to(z.dtype).T
            back = torch.autograd.grad(a, wide, da.to(a.dtype))
            wanted.add(rows, a.detach().to(z.dtype), dh, [half.to(z.dtype) for half in back])
        return None, None, *wanted.all()


class _Gradients:
    """Of V and of z, U and b of both halves, those that are wanted, filled slice by slice."""

    def __init__(self, V: Tensor, halves: list[Any], needed: tuple[bool, ...]) -> None:
        self._halves = halves
        self._V = torch.empty_like(V) if needed[0] else None
        self._rest = [
            (torch.zeros_like(like, dtype=torch.float32) if place % 3 == 0 else torch.empty_like(like))
            if need
            else None
            for place, (like, need) in enumerate(zip(halves, needed[1:], strict=True))
        ]

    def add(self, rows: slice, a: Tensor, dh: Tensor, wide: list[Tensor]) -> None:
        if self._V is not None:
            self._V[rows] = a.T @ dh
        for (z, U, _), (dz, dU, db), back in zip(_pairs(self._halves), _pairs(self._rest), wide, strict=True):
            if dz is not None:
                dz.view(-1, dz.shape[-1]).add_(back @ U[rows].to(back.dtype))
            if dU is not None:
                dU[rows] = back.T @ z.reshape(-1, z.shape[-1])
            if db is not None:
                db[rows] = back.sum(0)

    def all(self) -> list[Tensor | None]:
        narrow = [
            one if one is None else one.to(like.dtype) for one, like in zip(self._rest, self._halves, strict=True)
        ]
        return [self._V, *narrow]


def _pairs(halves: Any) -> list[Any]:
    return [halves[:3], halves[3:]]


def _slices(z: Tensor, V: Tensor) -> list[slice]:
    """Of the rows of V, so long that a slice stays in a cache."""
    entries = _CACHED if z.device.type == "cpu" else _ELSEWHERE
    rows = max(128, entries // max(1, z.shape[:-1].numel()))
    return [slice(start, start + rows) for start in range(0, len(V), rows)]


def _wide(half: tuple[Tensor, Tensor, Tensor | None], rows: slice) -> Tensor:
    """(tokens, rows) of z U^T + b, in z's dtype."""
    z, U, bias = half
    part = None if bias is None else bias[rows].to(z.dtype)
    return F.linear(z.reshape(-1, z.shape[-1]), U[rows].to(z.dtype), part)
