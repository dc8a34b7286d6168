"""Truncated SVD of one 70B-sized matrix: block subspace iteration against torch.linalg.svd, in one process.

    python -m tests.benchmarks.svd [--out 8192 --in 28672 --rank 128]

A Gaussian matrix is the hardest case there is: its spectrum is as flat as spectra get, so a subspace converges slowly.
The certified error is the one that `truncated_svd` reports, the optimum that of all singular values.
"""

from __future__ import annotations

import argparse
import time

import torch

from sctconv.runtime.linalg import frobenius_norm, truncated_svd
from tests.benchmarks.measure import header


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=8192)
    parser.add_argument("--in", dest="in_", type=int, default=28672)
    parser.add_argument("--rank", type=int, default=128)
    options = parser.parse_args()
    header(f"truncated SVD of a Gaussian {options.out} x {options.in_} at rank {options.rank}, float32, seed 0")
    torch.manual_seed(0)
    W = torch.randn(options.out, options.in_)

    ours = []
    for _ in range(2):
        start = time.perf_counter()
        found = truncated_svd(W, options.rank, method="subspace")
        ours.append(time.perf_counter() - start)
    start = time.perf_counter()
    sigma = torch.linalg.svd(W, full_matrices=False)[1]
    full = time.perf_counter() - start

    optimum = float(sigma[options.rank :].double().norm()) / frobenius_norm(W)
    print("| method | seconds | error | error / optimum | faster |\n|---|---|---|---|---|")
    print(f"| torch.linalg.svd | {full:.1f} | {optimum:.6f} | 1 | 1 |")
    print(
        f"| subspace, first call | {ours[0]:.1f} | {found.error:.6f} | {found.error / optimum:.5f} | {full / ours[0]:.1f} |"
    )
    print(
        f"| subspace, second call | {ours[1]:.1f} | {found.error:.6f} | {found.error / optimum:.5f} | {full / ours[1]:.1f} |"
    )


if __name__ == "__main__":
    main()
