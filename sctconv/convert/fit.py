"""The closed forms: factors that reproduce a layer's outputs, not its weights.

A layer gets inputs x~ (of the student: the model whose earlier layers are factored already) and should give y. Over the
calibration tokens, with K = sum x~ x~^T (n, n) and T = sum y x~^T (m, n), the W' of rank k that minimises
`sum |y - W' x~|^2` is `svd_k(T L^-T) L^-1` for any root L L^T = K (reduced-rank regression; SVD-LLM's whitening is the
case y = W x~). The text says little about directions that it seldom visits, and K^-1 magnifies what little it says; so W'
is pulled towards the layer's own W by a ridge: K + r I and T + r W, with r a share of K's mean eigenvalue. There the
answer is what plain truncation would give. SmolLM2-135M, MLP at rank 128, 16k tokens of WikiText-2 valid, perplexity on
test: 192.8 with eigenvalues only floored, 162.4 with a ridge of 0.03.

`closed_form` works on moments, n x n. `closed_form_dual` gives the same answer from the tokens themselves, N x N, where
n is so large that K does not fit: with the residual E = y - W x~ and G = X~^T X~ (N, N),
`(T + r W) (K + r I)^-1 = W + E (G + r I)^-1 X~^T`. Everything that decides is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sctconv.runtime.linalg import EXACT_SIDE, rank_for_energy, singular_values, truncated_svd

from .metric import Metric

RIDGE: Final = 0.03
"""The ridge as a share of K's mean eigenvalue."""

_FLOOR: Final = 1e-7
"""The least ridge as a share of K's mean eigenvalue, which keeps K's root from failing on rounding."""

_COLUMNS: Final = 4096
"""Columns of a large matrix that are worked on at once."""

_ROWS: Final = 1024
"""Rows of one."""


@dataclass
class Moments:
    """Sums over calibration tokens; see the module. `mean_x`, `mean_y` only where a bias is to be corrected.

    Attributes:
        K: (n, n) float64, sum of x~ x~^T.
        T: (m, n) float64, sum of y x~^T; or, where y = W x for some other inputs x, sum of x x~^T (n, n), with `W`.
        yy: sum of |y|^2.
        count: tokens.
        W: (m, n) that T is still to be multiplied with, or None.
        mean_x: (n,) float64 or None.
        mean_y: (m,) float64 or None.
    """

    K: Tensor
    T: Tensor
    yy: float
    count: int
    W: Tensor | None = None
    mean_x: Tensor | None = None
    mean_y: Tensor | None = None

    def centred(self) -> Moments:
        """The moments of x~ and y less their means: what is left for W' once a bias takes the means."""
        if self.mean_x is None or self.mean_y is None:
            return self
        T = self.T if self.W is None else self.W.double() @ self.T
        K = self.K - self.count * torch.outer(self.mean_x, self.mean_x)
        T = T - self.count * torch.outer(self.mean_y, self.mean_x)
        return Moments(K, T, self.yy - self.count * float(self.mean_y @ self.mean_y), self.count)


@dataclass(frozen=True)
class Fit:
    """W' = U diag(s) V^T with the bias that goes with it.

    Attributes:
        U, s, V: (m, k), (k,), (n, k) float32; the SCT form.
        bias: (m,) float64, or None where the layer has none.
        error: sqrt(sum |y - W' x~ - b|^2 / sum |y|^2), float64, over the calibration tokens.
    """

    U: Tensor
    s: Tensor
    V: Tensor
    bias: Tensor | None
    error: float


@dataclass(frozen=True)
class DenseFit:
    """The same for a layer that stays dense: W' (m, n) float32."""

    weight: Tensor
    bias: Tensor | None
    error: float


@dataclass(frozen=True)
class Root:
    """K + r I = L L^T of inputs that several layers share.

    Attributes:
        L: (n, n) float64, lower triangular.
        ridge: r.
    """

    L: Tensor
    ridge: float

    @classmethod
    def of(cls, K: Tensor, ridge: float = RIDGE) -> Root:
        """Of K (n, n) float64, with a ridge as a share of its mean eigenvalue."""
        mean = max(float(K.diagonal().mean()), torch.finfo(torch.float64).tiny ** 0.5)
        for share in (max(ridge, _FLOOR), max(ridge, 1e-5), max(ridge, 1e-3), max(ridge, 1.0)):
            A = K.clone()
            A.diagonal().add_(share * mean)
            L, info = torch.linalg.cholesky_ex(A)
            if not info:
                return cls(L, share * mean)
        raise AssertionError("a positive semidefinite matrix plus its mean eigenvalue is positive definite")


def closed_form(
    moments: Moments,
    rank: int,
    *,
    prior: Tensor | None = None,
    root: Root | None = None,
    metric: Metric | None = None,
) -> Fit:
    """The best factors of a rank for some moments.

    Args:
        moments: of the layer's inputs and the outputs that it should give.
        rank: k, 1 <= k <= min(m, n).
        prior: W (m, n) to be pulled towards; None for no pull.
        root: of `moments.centred().K` with the ridge; made here where it is not given.
        metric: C: what is minimised is `sum |C (y - W' x~)|^2`; None for the identity.

    Raises:
        ValueError: the rank does not fit.
    """
    centred = moments.centred()
    root = root or Root.of(centred.K, RIDGE if prior is not None else 0.0)
    M = _whitened(centred, prior, root)
    m, n = M.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} does not fit a layer of {m} x {n}")
    if metric is not None:
        M = metric.apply_(M)
    if min(m, n) > EXACT_SIDE:
        svd = truncated_svd(M, rank)
        A, B = svd.U.double(), svd.V.double() * svd.s.double()
    elif m <= n:
        A = torch.linalg.eigh(M @ M.T).eigenvectors[:, -rank:]
        B = M.T @ A
    else:
        B = torch.linalg.eigh(M.T @ M).eigenvectors[:, -rank:]
        A = M @ B
    A = A if metric is None else metric.solve(A)
    del M  # what follows needs room of its own
    U, s, V = sct_form(A, torch.linalg.solve_triangular(root.L.T, B, upper=True))
    bias = None
    if moments.mean_x is not None and moments.mean_y is not None:
        bias = moments.mean_y - U @ (s * (V.T @ moments.mean_x))
    return Fit(U.float(), s.float(), V.float(), bias, _error(centred, U, s, V))


def closed_form_dense(moments: Moments, *, prior: Tensor | None = None, root: Root | None = None) -> DenseFit:
    """The same without a limit to the rank: `W' = (T + r W) (K + r I)^-1`, ridge regression towards W."""
    centred = moments.centred()
    root = root or Root.of(centred.K, RIDGE if prior is not None else 0.0)
    m, n = len(centred.T if centred.W is None else centred.W), len(centred.K)
    weight = torch.empty(m, n, device=centred.K.device)
    cross = square = 0.0
    for start in range(0, m, _ROWS):
        rows = slice(start, start + _ROWS)
        T = centred.T[rows] if centred.W is None else centred.W[rows].double() @ centred.T
        right = T if prior is None else T + root.ridge * prior[rows].double()
        W = torch.cholesky_solve(right.T, root.L).T
        cross += float((T * W).sum())
        square += float(((W @ centred.K) * W).sum())
        weight[rows] = W.float()
    bias = None
    if moments.mean_x is not None and moments.mean_y is not None:
        bias = moments.mean_y - weight.double() @ moments.mean_x
    error = max(0.0, centred.yy - 2.0 * cross + square)
    return DenseFit(weight, bias, math.sqrt(error / centred.yy) if centred.yy > 0.0 else 0.0)


def closed_form_bytes(m: int, n: int) -> int:
    """What `closed_form` or `closed_form_dense` of an (m, n) layer holds at most, its moments included.

    K, its root, T and one or two matrices like it on the way; M, in float32 where the layer is large, and twice in float64 where
    it is small.
    """
    if min(m, n) <= EXACT_SIDE:
        return 8 * (5 * n * n + 3 * m * n)
    return max(40 * n * n, 36 * n * n + 4 * m * n)


def closed_form_dual_bytes(m: int, n: int, tokens: int) -> int:
    """What `closed_form_dual` holds at most, inputs and outputs included.

    The outputs' Gram matrix, W_full and a part of it in float64 twice; inputs twice, outputs and what is made of them.
    """
    return 8 * m * m + 4 * m * n + 16 * m * _COLUMNS + tokens * (8 * n + 40 * m) + 16 * tokens**2


def rank_by_output_energy(
    moments: Moments, energy: float, *, prior: Tensor, root: Root, metric: Metric | None = None
) -> int:
    """The least rank whose whitened factors keep a share of ||C M||_F^2, that is, of the outputs' weighted energy."""
    M = _whitened(moments.centred(), prior, root)
    return rank_for_energy(singular_values(M if metric is None else metric.apply_(M)), energy)


def closed_form_dual(
    x: Tensor, y: Tensor, rank: int, *, prior: Tensor, ridge: float = RIDGE, metric: Metric | None = None
) -> Fit:
    """`closed_form` of a layer without bias, from tokens in place of moments: no matrix is n x n.

    Args:
        x: (N, n) float32, the layer's inputs.
        y: (N, m) float32, the outputs that it should give; overwritten.
        rank: k, 1 <= k <= min(m, n).
        prior: W (m, n) float32 to be pulled towards.
        ridge: how strongly, as a share of K's mean eigenvalue.
        metric: as there.

    Raises:
        ValueError: the rank does not fit.
    """
    m, n = prior.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} does not fit a layer of {m} x {n}")
    columns = [slice(start, start + _COLUMNS) for start in range(0, n, _COLUMNS)]
    yy = float(y.double().square().sum())
    G = torch.zeros(len(x), len(x), dtype=torch.float64)
    for block in columns:
        part = x[:, block].double()
        G.addmm_(part, part.T)
    r = max(ridge, _FLOOR) * max(float(G.diagonal().sum()) / n, torch.finfo(torch.float64).tiny ** 0.5)
    residual = y.sub_(x @ prior.T)  # E^T (N, m)
    G.diagonal().add_(r)
    alpha = torch.cholesky_solve(residual.double(), torch.linalg.cholesky(G))  # (N, m)
    G.diagonal().sub_(r)
    # M M^T for M = W_full (K + r I)^1/2, W_full = W + alpha^T X: its eigenvectors are M's left singular vectors
    gram = torch.zeros(m, m, dtype=torch.float64)
    outputs = (x @ prior.T).double().addmm_(G, alpha)  # (N, m), what W_full gives
    gram.addmm_(outputs.T, outputs)
    target = residual.double().add_(x @ prior.T)
    full = torch.empty_like(prior)
    for block in columns:
        part = prior[:, block].double().addmm_(alpha.T, x[:, block].double())
        gram.addmm_(part, part.T, alpha=r)
        full[:, block] = part.float()
    gram = gram if metric is None else metric.apply_both_(gram)
    if m > EXACT_SIDE:
        Q = truncated_svd(gram, rank, tolerance=1e-6).U.double()
    else:
        Q = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    A, CtQ = (Q, Q) if metric is None else (metric.solve(Q), metric.apply_transposed(Q))
    U, s, V = sct_form(A, torch.cat([full[:, block].T.double() @ CtQ for block in columns]))
    lost = sum(
        float((y - (part.double() @ V * s) @ U.T).square().sum())
        for part, y in zip(x.split(_ROWS), target.split(_ROWS), strict=True)
    )
    return Fit(U.float(), s.float(), V.float(), None, math.sqrt(lost / yy) if yy > 0.0 else 0.0)


def sct_form(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A B^T, A (m, k) and B (n, k), as U diag(s) V^T with orthonormal U and V and descending s >= 0. Exact.

    Householder QR of both, which does not mind that B may be ill-conditioned, then a k x k SVD.
    """
    Qa, Ra = torch.linalg.qr(A)
    Qb, Rb = torch.linalg.qr(B)
    P, s, Rt = torch.linalg.svd(Ra @ Rb.T)
    return Qa @ P, s, Qb @ Rt.T


def _whitened(moments: Moments, prior: Tensor | None, root: Root) -> Tensor:
    """M = (T + r W) L^-T (m, n) float64; in float32 where it is large and only a product, W (X + r I) L^-T."""
    if moments.W is None:
        T = moments.T if prior is None else moments.T + root.ridge * prior
        return torch.linalg.solve_triangular(root.L, T.T, upper=False).T
    ridge = 0.0 if prior is None else root.ridge
    moments.T.diagonal().add_(ridge)  # there and back rather than a copy, which at n = 8192 is half a gigabyte
    S = torch.linalg.solve_triangular(root.L, moments.T.T, upper=False).T
    moments.T.diagonal().sub_(ridge)
    return moments.W @ S.float() if min(moments.W.shape) > EXACT_SIDE else moments.W.double() @ S


def _error(moments: Moments, U: Tensor, s: Tensor, V: Tensor) -> float:
    """sum |y - W' x|^2 = yy - 2 <T, W'> + <W' K, W'>, over yy."""
    if not moments.yy > 0.0:
        return 0.0
    left = U.T if moments.W is None else _product(U.T, moments.W)
    cross = float(((left @ moments.T) * (s[:, None] * V.T)).sum())
    square = float(((V.T @ moments.K @ V) * torch.outer(s, s)).diagonal().sum())
    return math.sqrt(max(0.0, moments.yy - 2.0 * cross + square) / moments.yy)


def _product(A: Tensor, W: Tensor) -> Tensor:
    """A W in float64 without all of W in it: A (k, m), W (m, n) float32."""
    parts = zip(A.split(_ROWS, 1), W.split(_ROWS), strict=True)
    return sum((a @ rows.double() for a, rows in parts), A.new_zeros(len(A), W.shape[1]))
