"""Laws of the truncated SVD, against torch.linalg.svd in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sctconv.runtime import linalg
from sctconv.runtime.linalg import (
    Method,
    NonFiniteError,
    check_finite,
    frobenius_norm,
    orthonormality,
    rank_for_energy,
    residual_norm,
    singular_values,
    truncated_svd,
)

FLOOR: dict[Method, float] = {"exact": 1e-6, "subspace": 2e-5}
"""What float32 factors, and float32 iterations, may leave of a matrix that is of rank k to the last digit."""

SHAPES = [(60, 60), (200, 40), (40, 200), (300, 170), (1, 9), (9, 1)]
METHODS: list[Method] = ["exact", "subspace"]


def _matrix(m: int, n: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Random singular vectors, singular values `exp(-decay i)`: 0 is as flat as a spectrum gets."""
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    U, _ = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))
    s = torch.exp(-decay * torch.arange(r, dtype=torch.float64)) * (1 + torch.rand(r, generator=generator))
    return ((U * s) @ V.T).float()


def _optimal_error(W: torch.Tensor, rank: int) -> float:
    sigma = torch.linalg.svdvals(W.double())
    return float(sigma[rank:].norm() / sigma.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_laws(shape: tuple[int, int], decay: float, method: Method) -> None:
    W = _matrix(*shape, decay)
    before = W.clone()
    for rank in sorted({1, min(shape) // 3 or 1, min(shape)}):
        svd = truncated_svd(W, rank, method=method)
        assert svd.U.shape == (shape[0], rank) and svd.s.shape == (rank,) and svd.V.shape == (shape[1], rank)
        assert orthonormality(svd.U) < 1e-5 and orthonormality(svd.V) < 1e-5
        assert (svd.s >= 0).all() and (svd.s.diff() <= 0).all()
        assert (svd.U.gather(0, svd.U.abs().argmax(0, keepdim=True)) > 0).all(), "signs are fixed"
        # the certificate is the error of the factors returned, and that is nearly the least there is
        true = (W.double() - (svd.U.double() * svd.s.double()) @ svd.V.double().T).norm() / W.double().norm()
        assert svd.error == pytest.approx(float(true), rel=1e-9, abs=1e-12)
        assert svd.error <= 1.001 * _optimal_error(W, rank) + FLOOR[method]
        assert svd.error**2 + svd.energy == pytest.approx(1.0, abs=1e-5), "Pythagoras"
    assert torch.equal(W, before)


@pytest.mark.parametrize("method", METHODS)
def test_error_never_grows_with_rank(method: Method) -> None:
    W = _matrix(120, 90, 0.02)
    errors = [truncated_svd(W, rank, method=method).error for rank in (5, 10, 20, 40, 80)]
    assert errors == sorted(errors, reverse=True)


def test_exact_singular_values_are_lapacks() -> None:
    W = _matrix(150, 400, 0.05)
    expected = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(truncated_svd(W, 150, method="exact").s, expected.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(singular_values(W), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("W", [torch.zeros(30, 20), torch.ones(30, 20), torch.eye(25)[:, :5] @ torch.eye(5, 40)])
def test_rank_deficient_matrices_still_give_orthonormal_factors(W: torch.Tensor, method: Method) -> None:
    svd = truncated_svd(W, 10, method=method)
    assert orthonormality(svd.U) < 1e-5 and orthonormality(svd.V) < 1e-5
    assert svd.error < FLOOR[method] and svd.energy == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e18])
@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method: Method, scale: float) -> None:
    W = _matrix(80, 50, 0.1)
    plain, scaled = truncated_svd(W, 8, method=method), truncated_svd(W * scale, 8, method=method)
    assert scaled.error == pytest.approx(plain.error, rel=1e-5)
    torch.testing.assert_close(scaled.s / scale, plain.s, rtol=1e-4, atol=0)


def test_same_seed_same_bits_and_another_seed_the_same_matrix() -> None:
    W = _matrix(300, 200, 0.05)
    one, two, other = (truncated_svd(W, 20, method="subspace", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.U, two.U) and torch.equal(one.s, two.s) and torch.equal(one.V, two.V)
    # the rule stops at 1e-3 of the tail's energy, so vectors may differ; what they capture may not
    assert one.error == pytest.approx(other.error, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_input(dtype: torch.dtype) -> None:
    W = _matrix(60, 40, 0.1).to(dtype)
    assert truncated_svd(W, 10).error == pytest.approx(truncated_svd(W.double(), 10).error, rel=1e-5)


def test_the_error_is_that_of_the_rounded_factors() -> None:
    W = _matrix(60, 40, 0.5)
    svd = truncated_svd(W, 40, dtype=torch.bfloat16)
    assert svd.U.dtype == svd.V.dtype == torch.bfloat16 and svd.s.dtype == torch.float32
    true = (W.double() - (svd.U.double() * svd.s.double()) @ svd.V.double().T).norm() / W.double().norm()
    assert svd.error == pytest.approx(float(true), rel=1e-9)
    assert 1e-4 < svd.error < 1e-2, "rounding to bfloat16 must be seen"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused_by_name(bad: float) -> None:
    W = _matrix(30, 20, 0.1)
    W[3, 4] = bad
    for factorise in (
        lambda: truncated_svd(W, 3, name="layer.weight"),
        lambda: singular_values(W, name="layer.weight"),
    ):
        with pytest.raises(NonFiniteError, match=r"layer\.weight: \d NaN and \d infinite of 600 entries"):
            factorise()


def test_large_finite_values_are_not_called_infinite() -> None:
    W = torch.full((40, 40), 3e38)
    assert check_finite(W, "W") == pytest.approx(3e38 * 40, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 21, -1])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} does not fit"):
        truncated_svd(torch.ones(30, 20), rank)


def test_lapack_failure_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    W, svd = _matrix(90, 60, 0.05), torch.linalg.svd
    expected = truncated_svd(W, 12, method="exact")

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "svd", fail)
    found = truncated_svd(W, 12, method="exact")
    monkeypatch.setattr(torch.linalg, "svd", svd)
    torch.testing.assert_close(found.s, expected.s, rtol=1e-5, atol=1e-6)
    assert found.error == pytest.approx(expected.error, rel=1e-6)
    assert orthonormality(found.U) < 1e-5 and orthonormality(found.V) < 1e-5


@pytest.mark.parametrize("energy", [0.01, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_rank_for_energy_is_the_least(energy: float) -> None:
    sigma = torch.linalg.svdvals(_matrix(80, 50, 0.1).double())
    k = rank_for_energy(sigma, energy)
    share = sigma.square().cumsum(0) / sigma.square().sum()
    assert share[k - 1] >= energy * (1 - 1e-12) and (k == 1 or share[k - 2] < energy)


def test_rank_for_energy_of_nothing() -> None:
    assert rank_for_energy(torch.zeros(5), 0.9) == 1


def test_norms_agree_with_float64() -> None:
    W = _matrix(333, 77, 0.01)
    assert frobenius_norm(W) == pytest.approx(float(W.double().norm()), rel=1e-12)
    zero = torch.zeros(333, 2), torch.zeros(2), torch.zeros(77, 2)
    assert residual_norm(W, *zero) == pytest.approx(frobenius_norm(W), rel=1e-12)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    W = _matrix(130, 70, 0.05)
    whole = truncated_svd(W, 9)
    monkeypatch.setattr(linalg, "_BLOCK_BYTES", 4096)
    pieces = truncated_svd(W, 9)
    assert pieces.error == pytest.approx(whole.error, rel=1e-12) and pieces.norm == pytest.approx(whole.norm, rel=1e-12)


def test_auto_is_exact_for_small_and_for_nearly_full_rank() -> None:
    assert truncated_svd(torch.randn(40, 60), 3).method == "exact"
    W = torch.randn(linalg.EXACT_SIDE + 1, linalg.EXACT_SIDE + 1, generator=torch.Generator().manual_seed(0))
    assert truncated_svd(W, 4).method == "subspace"
