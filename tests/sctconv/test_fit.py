"""Laws of the closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sctconv.convert.fit import Moments, Root, closed_form, closed_form_dense, closed_form_dual, sct_form
from sctconv.runtime.linalg import orthonormality

SHAPES = [(12, 9, 4), (9, 12, 4), (10, 10, 10), (7, 5, 1)]


def _data(m: int, n: int, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs x (tokens, n), outputs y (tokens, m) of some W plus noise, and W."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64) + 0.5
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return x, x @ W.T + 0.3 * torch.randn(tokens, m, generator=generator, dtype=torch.float64) + 1.0, W


def _moments(x: Tensor, y: Tensor, bias: bool = False) -> Moments:
    means = (x.mean(0), y.mean(0)) if bias else (None, None)
    return Moments(x.T @ x, y.T @ x, float(y.square().sum()), len(x), None, *means)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_no_other_factors_of_that_rank_do_better(m: int, n: int, rank: int, bias: bool) -> None:
    """Alternating least squares from many starts, an independent way to the same optimum, never gets below."""
    x, y, _ = _data(m, n)
    fit = closed_form(_moments(x, y, bias), rank)
    assert orthonormality(fit.U) < 1e-5 and orthonormality(fit.V) < 1e-5
    assert (fit.s >= 0).all() and (fit.s.diff() <= 0).all()
    W = (fit.U.double() * fit.s.double()) @ fit.V.double().T
    loss = float((y - x @ W.T - (fit.bias if fit.bias is not None else 0.0)).square().sum())
    xc, yc = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
    best = float("inf")
    for seed in range(6):
        B = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(300):
            A = torch.linalg.lstsq(xc @ B, yc).solution.T
            B = torch.linalg.lstsq(xc, yc @ torch.linalg.pinv(A.T)).solution
        best = min(best, float((yc - xc @ B @ A.T).square().sum()))
    assert loss <= best * (1 + 1e-4)
    norm = float((y - y.mean(0)).square().sum() if bias else y.square().sum())
    assert fit.error == pytest.approx((loss / norm) ** 0.5, rel=1e-3)


def test_white_inputs_give_the_plain_truncation() -> None:
    W = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fit = closed_form(Moments(torch.eye(9, dtype=torch.float64), W, float(W.square().sum()), 1), 4)
    U, s, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(fit.s.double(), s[:4], rtol=1e-6, atol=1e-6)
    product = (fit.U * fit.s) @ fit.V.T
    torch.testing.assert_close(product.double(), (U[:, :4] * s[:4]) @ Vh[:4], rtol=1e-5, atol=1e-5)


def test_a_strong_ridge_gives_the_plain_truncation_of_the_prior() -> None:
    x, y, W = _data(12, 9)
    fit = closed_form(_moments(x, y), 4, prior=W, root=Root.of(x.T @ x, 1e9))
    U, s, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(((fit.U * fit.s) @ fit.V.T).double(), (U[:, :4] * s[:4]) @ Vh[:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 0.03])
@pytest.mark.parametrize("tokens", [1, 3, 0])
def test_fewer_tokens_than_inputs_is_no_failure(tokens: int, ridge: float) -> None:
    x, y, W = _data(12, 9, tokens)
    fit = closed_form(_moments(x, y), 4, prior=W, root=Root.of(x.T @ x, ridge))
    for factor in (fit.U, fit.s, fit.V):
        assert torch.isfinite(factor).all()
    assert orthonormality(fit.U) < 1e-5 and orthonormality(fit.V) < 1e-5


def test_full_rank_without_noise_gives_the_weight_back() -> None:
    x, _, W = _data(12, 9)
    fit = closed_form(_moments(x, x @ W.T), 9, prior=W)
    torch.testing.assert_close(((fit.U * fit.s) @ fit.V.T).double(), W, rtol=1e-5, atol=1e-5)
    assert fit.error < 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_sct_form_is_exact_for_ill_conditioned_products(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    B = (
        torch.randn(20, 6, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -12, 6, dtype=torch.float64)
        * scale
    )
    U, s, V = sct_form(A, B)
    torch.testing.assert_close((U * s) @ V.T, A @ B.T, rtol=1e-10, atol=1e-12 * scale)
    assert orthonormality(U) < 1e-12 and orthonormality(V) < 1e-12 and (s.diff() <= 0).all()


@pytest.mark.parametrize("rank", [0, 10])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    x, y, _ = _data(12, 9)
    with pytest.raises(ValueError, match=f"rank {rank} does not fit a layer of 12 x 9"):
        closed_form(_moments(x, y), rank)


@pytest.mark.parametrize("tokens", [5, 60, 400])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_tokens_give_what_moments_give(m: int, n: int, rank: int, tokens: int) -> None:
    x, y, W = (part.float() for part in _data(m, n, tokens))
    fit = closed_form(_moments(x.double(), y.double()), rank, prior=W.double())
    dual = closed_form_dual(x, y.clone(), rank, prior=W)
    assert orthonormality(dual.U) < 1e-5 and orthonormality(dual.V) < 1e-5
    scale = float(fit.s[0])
    torch.testing.assert_close((dual.U * dual.s) @ dual.V.T, (fit.U * fit.s) @ fit.V.T, rtol=1e-3, atol=1e-3 * scale)
    assert dual.error == pytest.approx(fit.error, rel=1e-3, abs=1e-6)


def test_products_are_moments_of_the_other_inputs() -> None:
    x, _, W = _data(12, 9)
    other = x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    y = other @ W.T
    whole = closed_form(_moments(x, y), 4, prior=W)
    through = closed_form(Moments(x.T @ x, other.T @ x, float(y.square().sum()), len(x), W=W), 4, prior=W)
    torch.testing.assert_close((through.U * through.s) @ through.V.T, (whole.U * whole.s) @ whole.V.T)
    assert through.error == pytest.approx(whole.error)


@pytest.mark.parametrize("bias", [False, True])
def test_dense_is_ridge_regression_towards_the_weight(bias: bool) -> None:
    x, y, W = _data(12, 9, 40)
    fit = closed_form_dense(_moments(x, y, bias), prior=W)
    xc, yc = (x - x.mean(0), y - y.mean(0)) if bias else (x, y)
    r = 0.03 * float((xc.T @ xc).diagonal().mean())
    augmented = torch.cat([xc, r**0.5 * torch.eye(9, dtype=x.dtype)])
    expected = torch.linalg.lstsq(augmented, torch.cat([yc, r**0.5 * W.T])).solution.T
    torch.testing.assert_close(fit.weight.double(), expected, rtol=1e-5, atol=1e-5)
    residual = y - x @ fit.weight.double().T - (fit.bias if fit.bias is not None else 0.0)
    norm = float(yc.norm())
    assert fit.error == pytest.approx(float(residual.norm()) / norm, rel=1e-4)
