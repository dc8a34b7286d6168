"""Gated MLPs in slices, and attention with its probabilities kept: the same function and gradients as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sctconv.runtime.spectral import SpectralLinear
from sctconv.runtime.train import gated
from sctconv.runtime.train.attention import _Causal, probabilities_kept


def _linear(in_: int, out: int, bias: bool) -> SpectralLinear:
    layer = SpectralLinear(in_, out, 3, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


class _Mlp(nn.Module):
    """Names are the family's own; what counts is what the code does."""

    def __init__(self, activation: nn.Module, bias: bool) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = _linear(12, 300, bias), _linear(12, 300, bias), _linear(300, 12, bias)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class _Swapped(_Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x) * self.act(self.w1(x)))


class _Scaled(_Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.w2(self.act(self.w1(x)) * self.w3(x))


class _Doubled(_Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(2.0 * x))


def _gradients(mlp: nn.Module, x: Tensor) -> list[Tensor]:
    mlp.zero_grad()
    x = x.clone().requires_grad_()
    y = mlp(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(parameter.grad for parameter in mlp.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [_Mlp, _Swapped])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(approximate="tanh"), nn.ReLU()], ids=str)
def test_slices_give_what_the_module_gives(
    activation: nn.Module, kind: type[_Mlp], bias: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gated, "_CACHED", 128 * 10)  # three slices, the last one short
    mlp, x = kind(activation, bias), torch.randn(2, 5, 12)
    mlp.w1.U.requires_grad_(not frozen)
    plain = _gradients(mlp, x)
    with gated.in_slices(mlp):
        assert "forward" in vars(mlp)
        sliced = _gradients(mlp, x)
    assert "forward" not in vars(mlp)
    for one, other in zip(plain, sliced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize(
    "mlp", [_Scaled(nn.SiLU(), False), _Doubled(nn.SiLU(), False), _Mlp(nn.Softmax(-1), False)], ids=str
)
def test_what_computes_anything_else_is_left_alone(mlp: nn.Module) -> None:
    with gated.in_slices(mlp):
        assert "forward" not in vars(mlp)


@pytest.mark.parametrize(("heads", "fewer"), [(6, 3), (4, 4), (2, 1)])
@pytest.mark.parametrize("length", [1, 7, 128, 300])
def test_attention_is_as_near_to_the_exact_one_as_torch_s(length: int, heads: int, fewer: int) -> None:
    generator = torch.Generator().manual_seed(length)
    given = [torch.randn(2, n, length, 16, generator=generator).bfloat16() for n in (heads, fewer, fewer)]
    back = torch.randn(2, heads, length, 16, generator=generator).bfloat16()

    def both(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in given]
        output = function(*inputs)
        output.backward(back.to(dtype))
        return [output.detach().double(), *(tensor.grad.double() for tensor in inputs if tensor.grad is not None)]

    def usual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    exact, ours = both(usual, torch.float64), both(lambda q, k, v: _Causal.apply(q, k, v, 0.25), torch.bfloat16)
    for right, found in zip(exact, ours, strict=True):
        assert (found - right).norm() <= 0.01 * right.norm() + 1e-6


def _functions(node: Any) -> set[str]:
    """Names of what a tensor came from."""
    return set() if node is None else {node.name()}.union(*(_functions(before) for before, _ in node.next_functions))


def test_it_is_used_only_where_it_does_the_same() -> None:
    usual, module = ALL_ATTENTION_FUNCTIONS["sdpa"], nn.Module()
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    cases: list[tuple[dict[str, Any], bool, bool]] = [
        ({"attention_mask": None}, True, True),
        ({"attention_mask": None}, False, False),
        ({"attention_mask": mask}, True, False),
        ({"attention_mask": None, "is_causal": False}, True, False),
        ({"attention_mask": None, "dropout": 0.5}, True, False),
    ]
    with probabilities_kept():
        for more, autocast, is_ours in cases:
            inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *inputs, **more)
            assert ("_CausalBackward" in _functions(output.grad_fn)) == (
                is_ours and not torch.cpu._is_amx_tile_supported()
            ), more
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
