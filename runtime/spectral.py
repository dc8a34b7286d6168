"""Linear layers kept as truncated SVD factors (SCT, arXiv 2604.00733, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpectralLayer(nn.Module):
    """What a factored layer keeps of W (out, in) = U diag(s) V^T.

    Args:
        in_features: n; out_features: m.
        rank: k, 1 <= k <= min(m, n).

    Attributes:
        U: (m, k), orthonormal columns.
        s: (k,) descending and positive. Stays float32 where the factors are narrower, as an optimiser's step on a
            bfloat16 singular value is mostly rounded away.
        V: (n, k), orthonormal columns.

    The parameters are left uninitialised: they come from a file or a factorisation.

    Raises:
        ValueError: the rank does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank} does not fit a layer of {out_features} x {in_features}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.U = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.s = nn.Parameter(torch.empty(rank, device=device, dtype=torch.float32))
        self.V = nn.Parameter(torch.empty(in_features, rank, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class SpectralLinear(SpectralLayer):
    """`y = ((x V) * s) U^T + b`: a linear layer whose dense weight W = U diag(s) V^T (out, in) never exists.

    Costs `rank (in + out + 1)` parameters and as many multiplications a token, instead of `in * out`.
    In the paper's notation, `x U diag(s) V^T`, U and V are the other way round.

    Args:
        in_features: size of x's last dimension.
        out_features: size of y's last dimension.
        rank: k, 1 <= k <= min(in, out).
        bias: whether b exists.

    Attributes:
        U, s, V: see `SpectralLayer`.
        bias: (out,) or None.

    Raises:
        ValueError: the rank does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, device, dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out), in x's dtype."""
        return self.widened(self.narrowed(x))

    def narrowed(self, x: Tensor) -> Tensor:
        """`x V` (..., k): all that y depends on."""
        return x @ self.V

    def widened(self, h: Tensor) -> Tensor:
        """y of `x V`."""
        return F.linear(self.scaled(h), self.U, self.bias)

    def scaled(self, h: Tensor) -> Tensor:
        """`h * s`, in h's dtype."""
        return h * self.s.to(h.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class SpectralEmbedding(SpectralLayer):
    """`y = (U[ids] * s) V^T`: an embedding whose table U diag(s) V^T (vocabulary, width) never exists.

    A head tied to it is a `SpectralLinear` of the same three parameters. Here `out_features` is the vocabulary and
    `in_features` the width, as of that head.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> y (..., in)."""
        h = F.embedding(ids, self.U)
        return (h * self.s.to(h.dtype)) @ self.V.T
