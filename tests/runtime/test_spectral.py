"""SpectralLinear is the dense layer of its product, forwards and backwards."""

from __future__ import annotations

import pytest
import torch

from sctconv import SpectralLinear


def _layer(out: int, in_: int, rank: int, bias: bool, dtype: torch.dtype = torch.float64) -> SpectralLinear:
    torch.manual_seed(0)
    layer = SpectralLinear(in_, out, rank, bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 7, 5), (4, 4, 1)])
def test_forward_and_gradients_are_those_of_the_dense_product(shape: tuple[int, int, int], bias: bool) -> None:
    layer = _layer(*shape, bias)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    W = (layer.U * layer.s.double()) @ layer.V.T
    expected = torch.nn.functional.linear(x, W, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    parameters = [x, *layer.parameters()]
    for ours, dense in zip(
        torch.autograd.grad(layer(x).square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_layers_compute_in_their_dtype_with_float32_singular_values(dtype: torch.dtype) -> None:
    layer = _layer(6, 5, 3, True, dtype)
    assert layer.s.dtype == torch.float32
    assert layer(torch.randn(2, 5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("rank", [0, 6, -2])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} does not fit a layer of 9 x 5"):
        SpectralLinear(5, 9, rank)


def test_the_state_dict_has_the_factors_and_nothing_dense() -> None:
    layer = SpectralLinear(5, 9, 3)
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "U": (9, 3),
        "s": (3,),
        "V": (5, 3),
        "bias": (9,),
    }
