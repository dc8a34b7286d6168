"""Laws of the retractions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sctconv.runtime.linalg import orthonormality
from sctconv.runtime.retraction import (
    METHODS,
    Method,
    absorb_,
    drift,
    householder_qr,
    polar_direction,
    retract,
    retract_,
)
from sctconv.runtime.spectral import SpectralLinear

DTYPES = (torch.float32, torch.float64)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _matrix(m: int, k: int, seed: int, *, condition: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))
    return (U * torch.logspace(0, -torch.tensor(condition).log10(), k, dtype=torch.float64) @ V.T).to(dtype)


def _layer(m: int, n: int, k: int, seed: int = 0) -> SpectralLinear:
    layer = SpectralLinear(n, m, k, bias=False)
    with torch.no_grad():
        layer.U.copy_(_matrix(m, k, seed))
        layer.V.copy_(_matrix(n, k, seed + 1))
        layer.s.copy_(torch.linspace(3.0, 0.5, k))
    return layer


def _step(layer: SpectralLinear, size: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@settings(deadline=None, max_examples=60)
@given(
    k=st.integers(1, 12),
    extra=st.integers(0, 40),
    seed=st.integers(0, 10**6),
    step=st.floats(0.0, 0.3),
    dtype=st.sampled_from(DTYPES),
)
def test_after_a_step_it_is_the_sign_corrected_qr(
    k: int, extra: int, seed: int, step: float, dtype: torch.dtype
) -> None:
    noise = torch.randn(k + extra, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = (_matrix(k + extra, k, seed) + step * noise / (k + extra) ** 0.5).to(dtype)
    Q = retract(X)
    condition = float(torch.linalg.cond(X.double()))
    assert orthonormality(Q) < 50 * _eps(dtype)
    torch.testing.assert_close(Q, householder_qr(X), rtol=0, atol=100 * _eps(dtype) * condition)
    R = Q.mT.double() @ X.double()
    assert (R.diagonal() > 0).all() and R.tril(-1).abs().max() < 100 * _eps(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [1, 2, 3, 5, 7, 10, 14])
def test_ill_conditioned(exponent: int, dtype: torch.dtype) -> None:
    X = _matrix(60, 8, 3, condition=10.0**exponent, dtype=dtype)
    Q = retract(X)
    assert orthonormality(Q) < 100 * _eps(dtype)
    if 10.0**exponent * _eps(dtype) < 1e-2:  # beyond, the last columns are noise in any algorithm
        torch.testing.assert_close(Q, householder_qr(X), rtol=0, atol=300 * _eps(dtype) * 10.0**exponent)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["zero", "zero column", "equal columns", "tiny", "huge"])
def test_deficient_and_extreme_matrices_still_give_orthonormal_columns(
    kind: str, dtype: torch.dtype, method: Method
) -> None:
    X = _matrix(30, 5, 1, dtype=dtype)
    if kind == "zero":
        X.zero_()
    elif kind == "zero column":
        X[:, 2] = 0.0
    elif kind == "equal columns":
        X[:, 4] = X[:, 0]
    else:
        X *= 1e-12 if kind == "tiny" else 1e12
    assert orthonormality(retract(X, method)) < 100 * _eps(dtype)


def test_one_bad_matrix_does_not_touch_the_others_of_its_batch() -> None:
    X = torch.stack([_matrix(30, 5, seed, dtype=torch.float32) for seed in range(4)])
    X[2, :, 1] = X[2, :, 0]
    Q = retract(X)
    for place in (0, 1, 3):
        torch.testing.assert_close(Q[place], retract(X[place]), rtol=0, atol=1e-6)
    assert orthonormality(Q[2]) < 1e-5


def test_polar_is_the_nearest_point() -> None:
    X = _matrix(20, 4, 0) + 0.1 * torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(retract(X, "polar"), U @ Vh)
    assert (X - retract(X, "polar")).norm() < (X - retract(X)).norm()


def test_a_point_of_the_manifold_stays() -> None:
    X = _matrix(40, 6, 2, dtype=torch.float32)
    for method in METHODS:
        moved = retract(X, method)
        if method != "polar":
            moved = moved * torch.sign((moved * X).sum(0))
        torch.testing.assert_close(moved, X, rtol=0, atol=1e-6)


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match="no more columns than rows"):
        retract(torch.randn(3, 4))
    with pytest.raises(ValueError, match="retraction 'cayley': choose one of qr"):
        retract(torch.randn(4, 3), "cayley")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_model_comes_back(method: Method) -> None:
    model = nn.Sequential(_layer(24, 16, 4), nn.ReLU(), _layer(16, 24, 4), _layer(24, 16, 3))
    expected = []
    for layer in model:
        if isinstance(layer, SpectralLinear):
            _step(layer)
            expected += [retract(layer.U.detach(), method), retract(layer.V.detach(), method)]
    assert drift(model) > 1e-2
    retract_(model, method)
    assert drift(model) < 1e-5
    found = [factor for layer in model if isinstance(layer, SpectralLinear) for factor in (layer.U, layer.V)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=1e-6)


def test_absorbing_keeps_the_function() -> None:
    layer = _layer(24, 16, 4)
    _step(layer, 0.05)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(4))
    before, old = layer(x).detach(), layer.U.detach().clone()
    rotation = absorb_(layer)
    torch.testing.assert_close(layer(x).detach(), before, rtol=1e-5, atol=1e-5)
    assert drift(layer) < 1e-5 and (layer.s > 0).all() and (layer.s.diff() <= 0).all()
    torch.testing.assert_close(layer.U.detach().double(), retract(old).double() @ rotation.P, rtol=0, atol=1e-5)


def test_no_spectral_layer_is_no_drift() -> None:
    assert drift(nn.Linear(3, 3)) == 0.0


@settings(deadline=None, max_examples=40)
@given(
    k=st.integers(1, 12),
    extra=st.integers(0, 40),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
)
def test_the_polar_direction_is_the_polar_factor(k: int, extra: int, seed: int, scale: float) -> None:
    M = _matrix(k + extra, k, seed, condition=20.0)
    nearest = retract(M, "polar")
    for dtype in DTYPES:
        found = polar_direction((M * scale).to(dtype))
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), nearest, rtol=0, atol=1e-3)


def test_the_polar_direction_of_what_is_not_there_is_nothing() -> None:
    assert not polar_direction(torch.zeros(2, 7, 3)).any()
    M = torch.zeros(7, 3)
    M[0, 0] = 2.0
    torch.testing.assert_close(polar_direction(M), M / 2, rtol=0, atol=1e-5)
    noisy = polar_direction(_matrix(40, 6, 0, condition=1e9, dtype=torch.float32))
    assert float(torch.linalg.matrix_norm(noisy, 2)) <= 1.001
