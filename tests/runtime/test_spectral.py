"""Spectral layers are the dense layers of their product, forwards and backwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sctconv import SpectralLinear
from sctconv.runtime.spectral import SpectralEmbedding


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


def test_an_embedding_is_that_of_the_dense_table() -> None:
    torch.manual_seed(0)
    layer = SpectralEmbedding(5, 9, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ids = torch.tensor([[0, 3, 8], [3, 3, 1]])
    table = (layer.U * layer.s.double()) @ layer.V.T
    expected = torch.nn.functional.embedding(ids, table)
    torch.testing.assert_close(layer(ids), expected)
    for ours, dense in zip(
        torch.autograd.grad(layer(ids).square().sum(), list(layer.parameters())),
        torch.autograd.grad(expected.square().sum(), list(layer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-6)


_LARGE = """
import torch
from sctconv.runtime.memory import peak_rss_bytes
from sctconv.runtime.retraction import retract, retract_, tangent
from sctconv.runtime.spectral import SpectralLinear
from sctconv.runtime.train.optimizer import SpectralAdam
layer = SpectralLinear(8192, 28672, 32, bias=False)
with torch.no_grad():
    for factor in (layer.U, layer.s, layer.V):
        factor.normal_()
retract_(layer)
groups = [{"params": [layer.U, layer.V], "kind": "stiefel", "rate": 0.01},
          {"params": [layer.s], "kind": "singular", "rate": 0.01}]
optimizer = SpectralAdam(groups, tangent=tangent, retract=retract)
x = torch.randn(64, 8192)
before = peak_rss_bytes()
for _ in range(2):
    layer(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(peak_rss_bytes() - before)
"""


def test_training_a_large_layer_takes_no_memory_of_its_dense_shape() -> None:
    result = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True, check=True)
    grown = int(result.stdout)
    factors, dense = 4 * 32 * (8192 + 28672), 4 * 8192 * 28672
    assert grown < 20 * factors < dense / 8, f"{grown / 2**20:.0f} MiB"
