"""Retraction at the paper's shapes: one `torch.linalg.qr` after the other against batched Cholesky-QR.

    python -m tests.benchmarks.retraction [--matrices 4] [--step]

Both start from the same factors after a step of 0.01 rad a column. The baseline is the paper's loop: QR of every matrix,
columns multiplied by the sign of R's diagonal. `drift` is the largest |Q^T Q - I| that ours leaves, `difference` the largest
between the two. With --step, instead: its share of training steps of 8 x 256 tokens, SmolLM2-135M's architecture at rank 128 from
random factors, with the defaults of `sctconv train`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import sctconv
from sctconv.convert.scratch import initial_files, initialise
from sctconv.runtime.linalg import orthonormality
from sctconv.runtime.retraction import retract
from sctconv.runtime.train import Progress, TrainOptions, load_data, loop, train
from tests.benchmarks.measure import header, median_seconds
from tests.models import WIKITEXT, real_gguf

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


def share(steps: int = 6) -> None:
    """Prints the medians of whole steps and of what `retract` takes in them; the first step is a warm-up."""
    spent, whole, began = [0.0], [], [time.perf_counter()]

    def timed(X: torch.Tensor, method: Any = "qr") -> torch.Tensor:
        start = time.perf_counter()
        moved = retract(X, method)
        spent[-1] += time.perf_counter() - start
        return moved

    def step(done: Progress) -> None:
        whole.append(time.perf_counter() - began[0])
        began[0] = time.perf_counter()
        spent.append(0.0)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.sct"
        initialise(initial_files(str(real_gguf())), path, rank=128)
        model, tokenizer = sctconv.load(path)
        assert tokenizer is not None
        data = load_data([str(WIKITEXT.with_name("valid.txt"))], tokenizer, context=256, held_out=0.01)
        options = TrainOptions(steps=steps, batch=8, micro_batch=4, context=256, eval_every=0, angle=3e-3, rate=1e-4)
        loop.retract = timed  # type: ignore[attr-defined]
        try:
            train(model, data, options, on_step=step)
        finally:
            loop.retract = retract  # type: ignore[attr-defined]
    last = slice(1, steps - 1)  # after the last the held-out windows are looked at
    seconds, part = statistics.median(whole[last]), statistics.median(spent[last])
    print(f"| s a step | retraction s | share |\n|---|---|---|\n| {seconds:.2f} | {part:.3f} | {part / seconds:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--step", action="store_true", help="the share of a training step")
    arguments = parser.parse_args()
    if arguments.step:
        header("retraction in steps of 2048 tokens, SmolLM2-135M's shape at rank 128")
        share()
        return
    count = arguments.matrices
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
