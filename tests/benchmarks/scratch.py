"""Training from scratch: factored models by rank and optimiser against the dense model, at equal tokens.

    python -m tests.benchmarks.scratch [--steps 300] [--ranks 32 64 128]

A Llama of 8 layers, width 320, over bytes (about 10M parameters dense), on WikiText-2 valid, 16 windows of 256 bytes a step;
what is printed is the loss on the first 65,536 bytes of WikiText-2 test, nats a byte, as the run goes on. `paper` is AdamW at
5e-4 on everything with QR after each step, `dense` the same model unfactored with AdamW at 1e-3, `ours` the defaults of
`sctconv train` for a model that `sctconv init` began. All have cosine after a warm-up, the same seed and the same windows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import sctconv
from sctconv.convert.scratch import initial_files, initialise
from sctconv.runtime.evaluate import perplexity
from sctconv.runtime.skeleton import load_tokenizer
from sctconv.runtime.train import TrainOptions, load_data, train
from sctconv.runtime.train.options import SCRATCH
from tests.benchmarks.measure import header
from tests.models import WIKITEXT, tiny_tokenizer

_VALID = WIKITEXT.with_name("valid.txt")
_EVALUATED = 65_536

CONFIG = LlamaConfig(
    vocab_size=260, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
    num_key_value_heads=5, max_position_embeddings=256, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
)  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"optimizer": "adamw", "rate": 1e-3},
    "paper": {"optimizer": "adamw", "rate": 5e-4},
    "ours": SCRATCH,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="*", default=[32, 64, 128])
    parser.add_argument("--rows", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of our rows")
    arguments = parser.parse_args()
    changes = {name: float(value) for name, value in (item.split("=") for item in arguments.set)}
    header(f"from scratch, {arguments.steps} steps of 4096 bytes, seed 0 {changes or ''}")
    quarter = max(1, arguments.steps // 4)
    looks = "".join(f"{f'step {place * quarter}':>11}" for place in range(1, 5))
    print(f"{'':8}{'rank':>6}{'parameters':>12}{looks}{'s a step':>10}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "model"
        CONFIG.save_pretrained(source)
        tiny_tokenizer(source)
        for row in arguments.rows:
            for rank in [None] if row == "dense" else arguments.ranks:
                _row(row, rank, source, arguments.steps, quarter, changes if row == "ours" else {})


def _row(row: str, rank: int | None, source: Path, steps: int, every: int, changes: dict[str, float]) -> None:
    settings = {**SETTINGS[row], **changes}
    options = TrainOptions(
        steps=steps, batch=16, micro_batch=8, context=256, held_out=0.02, eval_every=0,
        **settings,
    )  # fmt: skip
    if rank is None:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(CONFIG)
        tokenizer = load_tokenizer(initial_files(str(source)))
    else:
        path = source.parent / f"{rank}.sct"
        initialise(initial_files(str(source)), path, rank=rank, overwrite=True)
        model, tokenizer = sctconv.load(path)
    assert tokenizer is not None
    data = load_data([str(_VALID)], tokenizer, context=256, held_out=0.02)
    ids = tokenizer(WIKITEXT.read_text(encoding="utf-8")[:_EVALUATED], verbose=False).input_ids[:_EVALUATED]
    losses = []
    began = time.perf_counter()

    def step(done: Any) -> None:
        if done.step % every == 0:
            model.eval()
            losses.append(perplexity(model, ids, context=256).nll)
            model.train()

    train(model, data, options, on_step=step)
    seconds = (time.perf_counter() - began) / steps
    figures = "".join(f"{loss:>11.4f}" for loss in losses[:4])
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{row:8}{rank or '':>6}{count / 1e6:>11.2f}M{figures}{seconds:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
