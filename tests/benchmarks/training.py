"""Perplexity after training, by start, optimiser and loss: same data, seed and token budget in every row.

    python -m tests.benchmarks.training [--steps 100] [--rows NAME ...] [--start FITTED.sct]

SmolLM2-135M-Instruct, MLP layers at rank 128, trained on WikiText-2 valid in steps of 4 x 512 tokens, measured on the first
8192 tokens of WikiText-2 test (and of Grimm's tales, where forgetting shows) at context 512. `plain` starts from the SVD of
each weight, `calibrated` from `sctconv convert --rank 128 --calibration-tokens 32768`. The paper's optimiser is AdamW at 5e-4
on everything with QR after each step; ours is the default of `sctconv train`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sctconv
from sctconv.convert import ConvertOptions, convert
from sctconv.runtime.evaluate import perplexity
from sctconv.runtime.train import ModelTeacher, TrainOptions, load_data, train
from sctconv.sources import open_source
from sctconv.sources.model import load_dense
from tests.benchmarks.measure import header
from tests.models import WIKITEXT, real_gguf

_VALID = WIKITEXT.with_name("valid.txt")
_TALES = WIKITEXT.parent.parent / "grimm" / "tales.txt"
_PAPER: dict[str, Any] = {"optimizer": "adamw", "rate": 5e-4, "norm_rate": 5e-4, "embedding_rate": 5e-4}

ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain, paper": ("plain", _PAPER, False),
    "calibrated, paper": ("calibrated", _PAPER, False),
    "calibrated, AdamW 1e-4": ("calibrated", {"optimizer": "adamw", "rate": 1e-4, "norm_rate": 1e-4}, False),
    "calibrated, ours": ("calibrated", {}, False),
    "calibrated, ours distilled": ("calibrated", {}, True),
}
"""Name -> start, options, whether the dense model teaches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--start", type=Path, help="a calibrated start that was converted already")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of our rows")
    arguments = parser.parse_args()
    changes = {name: float(value) for name, value in (item.split("=") for item in arguments.set)}
    header(f"training for {arguments.steps} steps of 2048 tokens, seed 0, {changes or 'default rates'}")
    with tempfile.TemporaryDirectory() as directory:
        starts = {
            "plain": Path(directory) / "plain.sct",
            "calibrated": arguments.start or Path(directory) / "fitted.sct",
        }
        wanted = {ROWS[row][0] for row in arguments.rows}
        for kind, path in starts.items():
            if kind in wanted and not path.exists():
                texts = (str(_VALID),) if kind == "calibrated" else ()
                convert(str(real_gguf()), path, ConvertOptions(rank=128, calibration=texts, calibration_tokens=32768))
        print(f"{'':30}{'steps':>6}{'WikiText-2':>12}{'Grimm':>12}{'s a step':>10}", flush=True)
        for row in arguments.rows:
            _row(row, starts[ROWS[row][0]], arguments.steps, changes)


def _row(row: str, start: Path, steps: int, changes: dict[str, float]) -> None:
    _, settings, taught = ROWS[row]
    settings = settings if settings else changes
    options = TrainOptions(steps=steps, context=512, eval_every=0, bf16=_has_bf16(), **settings)
    model, tokenizer = sctconv.load(start, dtype=torch.float32)
    teacher = ModelTeacher(load_dense(open_source(str(real_gguf()))).model) if taught else None
    data = load_data([str(_VALID)], tokenizer, context=512, held_out=0.02)
    ids = [tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids[:8192] for path in (WIKITEXT, _TALES)]
    began = time.perf_counter()

    def show(step: int, seconds: float) -> None:
        model.eval()
        figures = "".join(f"{perplexity(model, some).perplexity:>12.5g}" for some in ids)
        model.train()
        print(f"{row:30}{step:>6}{figures}{seconds / max(1, step):>10.2f}", flush=True)

    show(0, 0.0)
    train(model, data, options, teacher=teacher, on_step=_every(max(1, steps // 4), began, show))


def _every(count: int, began: float, show: Callable[[int, float], None]) -> Callable[[Any], None]:
    spent = 0.0

    def step(done: Any) -> None:
        nonlocal spent
        if done.step % count == 0:
            seconds = time.perf_counter() - began - spent
            show(done.step, seconds)
            spent = time.perf_counter() - began - seconds

    return step


def _has_bf16() -> bool:
    return torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()


if __name__ == "__main__":
    main()
