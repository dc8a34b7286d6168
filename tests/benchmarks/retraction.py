"""Retraction at the paper's shapes: one `torch.linalg.qr` after the other against batched Cholesky-QR.

    python -m tests.benchmarks.retraction [--matrices 4]

Both start from the same factors after a step of 0.01 rad a column. The baseline is the paper's loop: QR of every matrix,
columns multiplied by the sign of R's diagonal. `drift` is the largest |Q^T Q - I| that ours leaves, `difference` the largest
between the two.
"""

from __future__ import annotations

import argparse

import torch

from sctconv.runtime.linalg import orthonormality
from sctconv.runtime.retraction import retract
from tests.benchmarks.measure import header, median_seconds

ROWS = (8192, 28672)
RANKS = (32, 64, 128, 256)


def stepped(rows: int, rank: int, count: int) -> torch.Tensor:
    """Orthonormal factors (count, rows, rank) float32 after a step of 0.01 rad a column."""
    generator = torch.Generator().manual_seed(0)
    X = torch.linalg.qr(torch.randn(count, rows, rank, generator=generator))[0]
    return X + 0.01 / rows**0.5 * torch.randn(X.shape, generator=generator)


def paper(X: torch.Tensor) -> list[torch.Tensor]:
    """The paper's loop."""
    moved = []
    for matrix in X:
        Q, R = torch.linalg.qr(matrix)
        moved.append(Q * torch.sign(torch.diag(R)))
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=4)
    count = parser.parse_args().matrices
    header(f"retraction of {count} matrices, float32, seed 0, medians of 5 in turn")
    print("| rows | rank | torch.linalg.qr ms | ours ms | faster | drift | difference |\n|---|---|---|---|---|---|---|")
    for rows in ROWS:
        for rank in RANKS:
            X = stepped(rows, rank, count)
            base, ours = median_seconds(lambda X=X: paper(X), lambda X=X: retract(X))  # type: ignore[misc]
            Q = retract(X)
            difference = max(float((a - b).abs().max()) for a, b in zip(Q, paper(X), strict=True))
            print(
                f"| {rows} | {rank} | {1e3 * base:.1f} | {1e3 * ours:.1f} | {base / ours:.1f} "
                f"| {max(orthonormality(q) for q in Q):.1e} | {difference:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
