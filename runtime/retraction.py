"""Back to the Stiefel manifold: orthonormal columns for U and V after a step of an optimiser.

The paper (arXiv 2604.00733, section 3.2) takes the Q of a QR decomposition whose R has a positive diagonal, by Householder
reflections, one matrix at a time. That Q is unique for an X of full rank, so it may be computed in any way; after a step X
is nearly orthonormal, its condition near 1, and one pass of Cholesky-QR gives the same Q to rounding: `G = X^T X`,
`L L^T = G`, `Q = X L^-T`, batched over equal shapes, a matrix product and a triangular solve where Householder needs a
column after the other. What guards it:

- The error of one pass grows with the square of X's condition. Where `max |G - I|` is not well below 1, all is done again
  in float64 with further passes, each on the result of the one before (CholeskyQR2, Yamamoto et al. 2015).
- Where Cholesky fails, the first of them is shifted (shifted CholeskyQR3, Fukaya et al. 2020).
- Where the result is still not orthonormal (X of deficient rank, or not finite), Householder, which always is.

Otherwise Gram matrices are summed in X's dtype; they are factored in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from .linalg import orthonormality
from .spectral import SpectralLayer
from .tensors import by_shape

Method = Literal["qr", "householder", "polar"]
METHODS: Final[tuple[Method, ...]] = ("qr", "householder", "polar")

_NEAR: Final = 0.1
"""max |X^T X - I| up to which one pass of Cholesky-QR is as good as Householder: the condition is at most 1.2."""

_NOISE: Final = 1e-3
"""Singular values of a momentum, over the largest, that count for nothing."""


def retract(X: Tensor, method: Method = "qr") -> Tensor:
    """The point of the Stiefel manifold that X is brought back to.

    Args:
        X: (..., m, k) with m >= k, float32 or float64; a batch of matrices of one shape, or one.
        method: `qr`: Q of the QR decomposition whose R has a positive diagonal, by Cholesky-QR with fallbacks.
            `householder`: the same by Householder reflections. `polar`: the nearest point, U V^T of X's SVD.

    Returns:
        (..., m, k) of the same dtype, X^T X = I to rounding.

    Raises:
        ValueError: X is wider than high, or the method is unknown.
    """
    if X.shape[-2] < X.shape[-1]:
        raise ValueError(f"{tuple(X.shape[-2:])}: no more columns than rows can be orthonormal")
    if method == "qr":
        return cholesky_qr(X)
    if method == "householder":
        return householder_qr(X)
    if method == "polar":
        return _polar(X)
    raise ValueError(f"retraction {method!r}: choose one of {', '.join(METHODS)}")


def householder_qr(X: Tensor) -> Tensor:
    """Q of X = Q R with a positive diagonal of R, X (..., m, k); where that is zero, its sign counts as positive.

    The reference: LAPACK's reflections, one matrix after the other. (The paper's own code multiplies by sign(0) = 0 there,
    which makes a column of zeros.)
    """
    Q, R = torch.linalg.qr(X)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def cholesky_qr(X: Tensor) -> Tensor:
    """The same Q by Cholesky-QR, batched; see the module for what happens where that does not suffice."""
    batch = X.reshape(-1, *X.shape[-2:])
    G = _gram(batch)
    L, info = torch.linalg.cholesky_ex(G)
    Q = _divided(batch, L)
    doubtful = ~((_distance(G) < _NEAR) & (info == 0))  # NaN is doubtful
    if doubtful.any():
        Q[doubtful] = _carefully(batch[doubtful].double()).to(X.dtype)
    return Q.reshape(X.shape)


def _carefully(X: Tensor) -> Tensor:
    """Q (b, m, k) of matrices that may be far from orthonormal, float64."""
    G = _gram(X)
    L, info = torch.linalg.cholesky_ex(G)
    Q = _divided(X, L)
    failed = info != 0
    if failed.any():
        Q[failed] = _shifted(X[failed], G[failed])
    for _ in range(2):
        Q = _divided(Q, torch.linalg.cholesky_ex(_gram(Q))[0])
    bad = ~(_distance(_gram(Q)) < 50 * torch.finfo(Q.dtype).eps)
    if bad.any():
        Q[bad] = householder_qr(X[bad])
    return Q


def _shifted(X: Tensor, G: Tensor) -> Tensor:
    """The first of shifted CholeskyQR3's passes: a factor that exists, and a Q that two plain passes make orthonormal."""
    rows, columns = X.shape[-2:]
    norm = torch.linalg.matrix_norm(G.nan_to_num(), 2)  # of X squared
    shift = 11.0 * (rows * columns + columns * (columns + 1)) * torch.finfo(X.dtype).eps * norm
    shifted = G + torch.diag_embed(shift.unsqueeze(-1).expand(G.shape[:-1]))
    return _divided(X, torch.linalg.cholesky_ex(shifted)[0])


def _divided(X: Tensor, L: Tensor) -> Tensor:
    """X L^-T; by the inverse, k x k, as a product of large matrices is what is fast."""
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return X @ torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False).mT.to(X.dtype)


def _gram(X: Tensor) -> Tensor:
    """X^T X (b, k, k), float64."""
    return _inner(X, X).double()


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    """X^T Y (..., k, k). A batch of one goes as two matrices: torch copies both where it is bfloat16 on a processor."""
    if X.ndim == 3 and len(X) == 1:
        return (X[0].mT @ Y[0]).unsqueeze(0)
    return X.mT @ Y


def _distance(G: Tensor) -> Tensor:
    """max |G - I| of each of a batch."""
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return (G - identity).abs().amax((-2, -1))


def _polar(X: Tensor) -> Tensor:
    """X (X^T X)^-1/2 by the eigenvalues of the Gram matrix; by an SVD where those are too small for it."""
    eigenvalues, P = torch.linalg.eigh(X.mT.double() @ X.double())
    if float(eigenvalues.min()) > 1e-6 * float(eigenvalues.max()):
        return (X.double() @ _inverse_root(eigenvalues, P)).to(X.dtype)
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return (U @ Vh).to(X.dtype)


def polar_direction(M: Tensor) -> Tensor:
    """M (M^T M)^-1/2, M (..., m, k): every direction that M has a part in, and all as long as each other.

    The columns of the result have length 1 or less: singular values that are below `_NOISE` of the largest stay short. (What
    Muon does to the momentum of a dense matrix, Jordan 2024, there m x n and by an iteration, here by a root k x k.)
    """
    norm = torch.linalg.vector_norm(M, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(M.dtype).tiny)
    M = M / norm
    squares, P = torch.linalg.eigh(_gram(M))
    least = _NOISE**2 * squares.amax(-1, keepdim=True).clamp_min(1.0 / M.shape[-1])  # of nothing there is no largest
    return M @ _inverse_root(squares.clamp_min(0.0) + least, P).to(M.dtype)


def _inverse_root(values: Tensor, P: Tensor) -> Tensor:
    """`P diag(values)^-1/2 P^T` (..., k, k), values positive."""
    return (P * values.rsqrt().unsqueeze(-2)) @ P.mT


def tangent(X: Tensor, G: Tensor) -> Tensor:
    """The part of G along the manifold at X: `G - X sym(X^T G)`, both (..., m, k), in G's dtype with products in X's.

    For the Euclidean gradient G this is the Riemannian one; for a momentum of earlier steps, its projection to where X is
    now (Absil, Mahony and Sepulchre 2008, section 3.6.1).
    """
    product = _inner(X, G.to(X.dtype))
    symmetric = 0.5 * (product + product.mT)
    if X.dtype == G.dtype and X.ndim == 3:
        return torch.baddbmm(G, X, symmetric, alpha=-1.0)  # one pass over G less
    return G - X @ symmetric


@torch.no_grad()
def retract_(model: nn.Module, method: Method = "qr") -> None:
    """Brings U and V of every spectral layer of a model back, in place; to be called after `optimizer.step()`.

    Equal shapes go in one batch. The function that a layer computes changes with it: what R held is dropped, as in the
    paper; `absorb_` keeps it.
    """
    for group in by_shape(factors(model)):
        if len(group) == 1:
            group[0].copy_(retract(group[0], method))
            continue
        for factor, moved in zip(group, retract(torch.stack([*group]), method), strict=True):
            factor.copy_(moved)


@dataclass(frozen=True)
class Rotation:
    """What `absorb_` turned a layer's columns by: `U_new = Q_U P`, `V_new = Q_V R`; both (k, k), orthogonal."""

    P: Tensor
    R: Tensor


@torch.no_grad()
def absorbed(U: Tensor, s: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Rotation]:
    """`U diag(s) V^T` again, with orthonormal U and V and descending s >= 0.

    `U = Q_U R_U`, `V = Q_V R_V`, and the SVD `R_U diag(s) R_V^T = P diag(s') R^T`, k x k in float64. What an optimiser
    keeps for U and V in their columns is to be multiplied by P and R.

    Args:
        U, s, V: (m, k), (k,), (n, k) of full rank; the sign and order of s are free.
    """
    halves = []
    for X in (U, V):
        Q = cholesky_qr(X)
        halves.append((Q, (Q.mT @ X).double()))
    (QU, RU), (QV, RV) = halves
    P, values, Rh = torch.linalg.svd(RU * s.double() @ RV.mT)
    return QU @ P.to(QU.dtype), values.to(s.dtype), QV @ Rh.mT.to(QV.dtype), Rotation(P, Rh.mT)


@torch.no_grad()
def absorb_(layer: SpectralLayer) -> Rotation:
    """Brings a layer back to SCT form without changing its function; see `absorbed`."""
    U, s, V, rotation = absorbed(layer.U, layer.s, layer.V)
    for factor, moved in zip((layer.U, layer.s, layer.V), (U, s, V), strict=True):
        factor.copy_(moved)
    return rotation


def factors(model: nn.Module) -> list[nn.Parameter]:
    """U and V of every spectral layer, those of tied layers once."""
    layers = (module for module in model.modules() if isinstance(module, SpectralLayer))
    return list(dict.fromkeys(factor for layer in layers for factor in (layer.U, layer.V)))


def drift(model: nn.Module) -> float:
    """max |X^T X - I| over all U and V, in float64: how far training has left the manifold."""
    return max((orthonormality(factor.detach()) for factor in factors(model)), default=0.0)
