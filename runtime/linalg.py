"""Truncated SVD with a certified error.

For W (m, n) and rank k the best approximation is `U diag(s) V^T` with the k largest singular triplets (Eckart and
Young 1936); its error is the tail `sqrt(sum_{i>k} sigma_i^2)`. Two ways to it:

- `exact`: LAPACK in float64, on a square triangle of side min(m, n) where W is far from square.
- `subspace`: block subspace iteration that keeps every block it has been through (randomised block Krylov, Musco and
  Musco 2015, algorithm 2), float32 products. The spectra of language models are flat, so the two iterations that are
  customary are not enough; it goes on until a block adds less than `tolerance` of the tail's energy. Keeping the
  blocks costs little memory and saves half the products: on a Gaussian 8192 x 28672 at rank 128, 11 plain iterations
  with a block of 160 ended at 1.0004 of the optimal tail in 20 s, 6 kept blocks of 136 at 1.0005 in 11 s.
  Its float32 shows only where W is within about 1e-5 of rank k: there the error does not fall below that.

Either way the error that is returned is measured on the factors that are returned, in float64, not estimated. It
says how good the approximation is; that it is nearly optimal is what the stopping rule is for and the tests show.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from sctconv.formats.errors import SctError

Method = Literal["auto", "exact", "subspace"]

EXACT_SIDE: Final = 1536
"""Up to this min(m, n) `auto` is exact: there LAPACK takes seconds at most."""

_BLOCK_BYTES: Final = 64 << 20


class NonFiniteError(SctError):
    """A tensor holds NaN or infinity."""


@dataclass(frozen=True)
class TruncatedSVD:
    """`W ~ U diag(s) V^T`.

    Attributes:
        U: (m, k), orthonormal columns to its dtype's rounding; the largest entry of each is positive.
        s: (k,) float32, descending, >= 0.
        V: (n, k), likewise.
        energy: ||U diag(s) V^T||_F^2 / ||W||_F^2, float64; 1 for W = 0.
        error: ||W - U diag(s) V^T||_F / ||W||_F, measured in float64; 0 for W = 0.
        norm: ||W||_F, float64.
        method: the way it was found.
    """

    U: Tensor
    s: Tensor
    V: Tensor
    energy: float
    error: float
    norm: float
    method: str

    @property
    def rank(self) -> int:
        """k."""
        return self.s.numel()


def truncated_svd(
    W: Tensor,
    rank: int,
    *,
    method: Method = "auto",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-3,
    seed: int = 0,
    name: str = "matrix",
) -> TruncatedSVD:
    """The truncated SVD of a matrix.

    Args:
        W: (m, n), any floating dtype, any device; not changed.
        rank: k, 1 <= k <= min(m, n).
        method: `exact`, `subspace`, or `auto`: exact where min(m, n) is at most `EXACT_SIDE` or k is a large part of it.
        dtype: what U and V are rounded to; the error is that of the rounded factors.
        tolerance: `subspace` stops when an iteration lowers the tail's energy by less than this share.
        seed: of the random start of `subspace`.
        name: what to call W in an error.

    Raises:
        NonFiniteError: W holds NaN or infinity.
        ValueError: the rank does not fit.
    """
    if W.ndim != 2 or not 1 <= rank <= min(W.shape):
        raise ValueError(f"{name}: rank {rank} does not fit a matrix of {tuple(W.shape)}")
    norm = check_finite(W, name)
    if method == "auto":
        method = "exact" if min(W.shape) <= EXACT_SIDE or 3 * rank > min(W.shape) else "subspace"
    with _full_precision():
        U, s, V = _exact(W, rank) if method == "exact" else _subspace(W, rank, norm, tolerance, seed)
        U, s, V = _fix_signs(U.float(), s.float(), V.float())
        U, V = U.to(dtype), V.to(dtype)
        error = residual_norm(W, U, s, V)
    energy = min(1.0, float(s.double().square().sum()) / norm**2) if norm else 1.0
    return TruncatedSVD(U, s, V, energy, error / norm if norm else 0.0, norm, method)


def singular_values(W: Tensor, *, name: str = "matrix") -> Tensor:
    """All singular values of W (m, n), (min(m, n),) float64, descending: the roots of the Gram matrix's eigenvalues.

    Squaring costs digits: values below about 1e-8 of the largest are noise. For shares of energy that is enough.

    Raises:
        NonFiniteError: W holds NaN or infinity.
    """
    check_finite(W, name)
    short = W if W.shape[0] <= W.shape[1] else W.T
    gram = torch.zeros(short.shape[0], short.shape[0], dtype=torch.float64, device=W.device)
    with _full_precision():
        for block in _column_blocks(short):
            gram.addmm_(block, block.T)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).sqrt_()


def rank_for_energy(sigma: Tensor, energy: float) -> int:
    """The least k with `sum_{i<=k} sigma_i^2 >= energy * sum_i sigma_i^2`; at least 1.

    Args:
        sigma: (r,) singular values, descending.
        energy: in (0, 1].
    """
    cumulative = sigma.double().square().cumsum(0)
    total = float(cumulative[-1])
    # a relative slack of a few roundings, so that energy = 1 is reached where the sum says it is
    reached = cumulative >= energy * total * (1 - 1e-14)
    return int(reached.to(torch.int8).argmax()) + 1 if total else 1


def frobenius_norm(W: Tensor) -> float:
    """||W||_F, summed in float64 without a float64 copy of W."""
    return math.sqrt(sum(float(block.double().square().sum()) for block in W.reshape(-1).split(_BLOCK_BYTES // 8)))


def residual_norm(W: Tensor, U: Tensor, s: Tensor, V: Tensor) -> float:
    """||W - U diag(s) V^T||_F in float64, in blocks of columns. W (m, n), U (m, k), s (k,), V (n, k)."""
    Us = U.double() * s.double()
    total, start = 0.0, 0
    for block in _column_blocks(W):
        stop = start + block.shape[1]
        total += float(block.sub_(Us @ V[start:stop].double().T).square_().sum())
        start = stop
    return math.sqrt(total)


def orthonormality(X: Tensor) -> float:
    """max |X^T X - I| in float64 for X (m, k): 0 for a point on the Stiefel manifold."""
    gram = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    for block in _column_blocks(X.T):
        gram.addmm_(block, block.T)
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())


def check_finite(W: Tensor, name: str) -> float:
    """Returns ||W||_F after refusing NaN and infinity; "SVD failed to converge" almost always means one of them.

    Raises:
        NonFiniteError: names the tensor and counts.
    """
    norm = frobenius_norm(W)
    if not math.isfinite(norm):  # float64 holds the square of any float32, so an entry is to blame
        nan, infinite = int(torch.isnan(W).sum()), int(torch.isinf(W).sum())
        raise NonFiniteError(
            f"{name}: {nan} NaN and {infinite} infinite of {W.numel()} entries; "
            "the checkpoint is damaged or was saved from a diverged run"
        )
    return norm


def _exact(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """float64 throughout. Of a matrix that is far from square, the SVD of the triangle of its QR."""
    if W.shape[0] < W.shape[1]:
        V, s, U = _exact(W.T, rank)
        return U, s, V
    A = W.double()
    Q, R = torch.linalg.qr(A) if A.shape[0] > 1.5 * A.shape[1] else (None, A)
    try:
        U, s, Vh = torch.linalg.svd(R, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # The divide-and-conquer driver can fail on a finite matrix; its eigenvalue problem does not.
        V = torch.linalg.eigh(R.T @ R).eigenvectors.flip(1)
        U, T = torch.linalg.qr(R @ V)
        s, U = T.diagonal().abs(), U * _signs(T.diagonal())
        Vh = V.T
    U, s, V = U[:, :rank], s[:rank], Vh[:rank].T
    return (U if Q is None else Q @ U), s, V


def _subspace(W: Tensor, rank: int, norm: float, tolerance: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block Krylov on the shorter side of A = W: span{X, (A A^T) X, (A A^T)^2 X, ...}, fully reorthogonalised.

    Q (m, p) is the orthonormal basis so far and B = Q^T A (p, n), of which each block's product gives p/blocks rows;
    the singular values of B are the Ritz values. float32 products, float64 for what decides.
    """
    if W.shape[0] > W.shape[1]:
        V, s, U = _subspace(W.T, rank, norm, tolerance, seed)
        return U, s, V
    A = W.float()
    m = A.shape[0]
    X = torch.randn(m, min(m, rank + 8), generator=torch.Generator().manual_seed(seed)).to(A.device)
    Q, B = X[:, :0], A[:0]
    gram = torch.zeros(0, 0, dtype=torch.float64, device=A.device)
    captured, is_last = 0.0, False
    while True:
        X = _orthonormal_against(Q, X)
        Y = X.T @ A
        cross, corner = B.double() @ Y.double().T, Y.double() @ Y.double().T
        gram = torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.T, corner], 1)])
        Q, B = torch.cat([Q, X], 1), torch.cat([B, Y])
        energy = float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        room = min(X.shape[1], m - Q.shape[1])
        tail = max(norm**2 - energy, 0.0)
        if is_last or not room:
            break
        if energy - captured > tolerance * tail and tail > 1e-12 * norm**2:
            captured = energy
            X = A @ Y[:room].T
        elif tail <= 1e-6 * norm**2:
            # A A^T X squares singular values, and of those below 1e-4 of the largest float32 leaves nothing beside it (its
            # rounding hides such a tail's energy too); what Q lacks shows only when seen by itself, once
            is_last = True
            fresh = torch.randn(m, room, generator=torch.Generator().manual_seed(seed + 1)).to(A.device)
            X = A @ (_orthonormal_against(Q, fresh).T @ A).T
        else:
            break
    Z, R = torch.linalg.qr(B.T)
    P, s, Sh = torch.linalg.svd(R.double().T, full_matrices=False)  # Q^T A = R^T Z^T
    return Q @ P[:, :rank].float(), s[:rank], Z @ Sh[:rank].T.float()


def _orthonormal_against(Q: Tensor, X: Tensor) -> Tensor:
    """An orthonormal basis of X's columns with their parts in span(Q) removed; twice, as once loses digits."""
    for _ in range(2):
        X, _ = torch.linalg.qr(X - Q @ (Q.T @ X))
    return X


def _fix_signs(U: Tensor, s: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors are unique up to a sign; the largest entry of each column of U is made positive."""
    largest = U.abs().argmax(0, keepdim=True)
    signs = _signs(U.gather(0, largest).squeeze(0))
    return (U * signs).contiguous(), s.contiguous(), (V * signs).contiguous()


def _signs(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _column_blocks(W: Tensor) -> Iterator[Tensor]:
    """W in float64 copies of at most `_BLOCK_BYTES`, left to right."""
    step = max(1, _BLOCK_BYTES // (8 * max(1, W.shape[0])))
    for start in range(0, W.shape[1], step):
        yield W[:, start : start + step].to(torch.float64, copy=True)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """TF32 off and no autograd while numbers that decide something are computed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
