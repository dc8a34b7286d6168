"""What an error of a layer's outputs costs at the model's end.

To second order a small error e of the outputs costs `e^T F e`, F = E[g g^T] over tokens, with g the gradient of the loss at
the outputs (the empirical Fisher matrix, token by token; over whole sequences it collapses). The closed forms minimise
`|C (Y - W' X~)|` with C^T C near F. F is measured on some thousand tokens and m may be 28,672, so it is kept as what such
data support (probabilistic PCA, Tipping and Bishop 1999, of the outputs in units of their own d):

    F ~ rho D (I + Q (Lambda / rho - 1) Q^T) D,   C = (I + Q (g - 1) Q^T) D,   g = sqrt(lambda / rho)

D = diag(d), d_j = sqrt(F_jj); Q (m, r) and lambda are the leading eigenvectors and eigenvalues of D^-1 F D^-1, rho the mean
of the others. Directions matter, not only coordinates. SmolLM2-135M, MLP at rank 256, 16k calibration tokens, F on 8192 of
them; perplexity on WikiText-2 test and Grimm's tales, and KL to the dense model on held-out windows:

    D alone                             58.5   258   0.819
    r = 128                             55.1   222   0.774
    r = 288                             55.5   203   0.776
    r = 128, ridge 0.1 (as it is now)   54.8   221   0.763
    all of F, ridge 0.1                 54.3   210   0.761    (m x m for every layer at once: too much memory)
    all of F, ridge 0.01                55.2   207   0.778
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sctconv.runtime.linalg import EXACT_SIDE, truncated_svd

RIDGE: Final = 0.1
"""Share of F's mean diagonal that is added to all of it: the few thousand tokens do not know what never matters."""

CLAMP: Final = 100.0
"""d is at most this many times its root mean square."""

DIRECTIONS: Final = 128
"""r, at most, and at most half of m."""

_LEAST: Final = 1e-3
"""rho is at least this, so that C is never ill-conditioned."""


@dataclass(frozen=True)
class Metric:
    """C (m, m) as above, never made.

    Attributes:
        d: (m,) float64, root mean square about 1.
        Q: (m, r) float32, orthonormal columns; r is 0 where only D is known.
        g: (r,) float64, >= 1.
    """

    d: Tensor
    Q: Tensor
    g: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Metric | None:
        """Of sum g g^T (m, m) float64, or of its diagonal (m,); None where there is no gradient. `moments` is overwritten."""
        squares = moments.diagonal() if moments.ndim == 2 else moments
        mean = float(squares.mean())
        if not mean > 0.0:
            return None
        squares += RIDGE * mean
        d = (squares / mean).sqrt().clamp_max(CLAMP)
        m = len(d)
        if moments.ndim == 1 or m < 2:
            return cls(d, torch.zeros(m, 0, device=d.device), d.new_zeros(0))
        r = min(DIRECTIONS, m // 2)
        F = moments.div_(mean).div_(d[:, None]).div_(d[None, :])
        trace = float(F.diagonal().sum())
        if m > EXACT_SIDE:
            svd = truncated_svd(F, r)  # of a positive semidefinite matrix: its eigenvectors and eigenvalues
            values, Q = svd.s.double(), svd.U
        else:
            values, vectors = torch.linalg.eigh(F)
            values, Q = values[-r:].flip(0), vectors[:, -r:].flip(1).float()
        rho = max(_LEAST, (trace - float(values.sum())) / (m - r))
        return cls(d, Q.contiguous(), (values / rho).clamp_min(1.0).sqrt())

    def apply_(self, X: Tensor) -> Tensor:
        """C X, X (m, n), in its place and dtype: X may be the largest matrix there is."""
        return self._stretch_(X.mul_(self.d[:, None].to(X.dtype)), self.g - 1.0)

    def apply_transposed(self, X: Tensor) -> Tensor:
        """C^T X."""
        return self._stretch_(X.clone(), self.g - 1.0).mul_(self.d[:, None].to(X.dtype))

    def solve(self, X: Tensor) -> Tensor:
        """C^-1 X."""
        return self._stretch_(X.clone(), 1.0 / self.g - 1.0).div_(self.d[:, None].to(X.dtype))

    def apply_both_(self, G: Tensor) -> Tensor:
        """C G C^T in G's place, G (m, m) symmetric."""
        Q, by = self.Q.to(G.dtype), (self.g - 1.0).to(G.dtype)
        self.apply_(G).mul_(self.d.to(G.dtype))
        return G.addmm_(G @ Q * by, Q.T) if self.g.numel() else G

    def _stretch_(self, X: Tensor, by: Tensor) -> Tensor:
        """(I + Q diag(by) Q^T) X in X's place."""
        Q = self.Q.to(X.dtype)
        return X.addmm_(Q * by.to(X.dtype), Q.T @ X) if self.g.numel() else X
