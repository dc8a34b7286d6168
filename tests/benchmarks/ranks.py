"""A 1.7B shape at several ranks: parameters, memory and seconds of a training step, beside a dense one.

    python -m tests.benchmarks.ranks [--ranks 32 64 128 256] [--rows dense ours lean] [--layers 24] [--steps 3]

The shape of SmolLM2-1.7B (24 layers, 2048/8192, vocabulary 49,152, tied), MLP layers factored as in the paper
(arXiv 2604.00733, section 4), begun from nothing by `sctconv init`, trained on 1 x 256 tokens of WikiText-2. All rows hold
weights and moments in float32 and multiply in the precision that the processor is fastest in. `dense` is AdamW on dense
matrices, `ours` the default of `sctconv train`, `lean` the same with blocks computed again and steps in the backward pass. Each row is a process of
its own: `peak` is what the operating system says of it, seconds are of its last step. A row that the machine has no memory
for is given as what its weights, gradients and moments alone take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sctconv.convert.scratch import initial_files, initialise
from sctconv.runtime.memory import installed_bytes
from sctconv.runtime.spectral import SpectralLinear
from tests.benchmarks.llama70b_step import in_process, measured, saved_tokenizer
from tests.benchmarks.measure import header

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 24, 2048, 8192, 49_152

ROWS: dict[str, dict[str, Any]] = {
    "dense": {"optimizer": "adamw"},
    "ours": {},
    "lean": {"checkpointing": "blocks", "step_in_backward": True},
}


def config(layers: int = LAYERS) -> LlamaConfig:
    """SmolLM2-1.7B's."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=8192, rope_theta=130_000.0,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--steps", type=int, default=3, help="the last is measured")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is not None:  # a row's own process
        print(json.dumps(_measured(arguments.rows[0], arguments.model, arguments.layers, arguments.steps)))
        return
    saved_tokenizer()
    header(f"a step of a 1.7B shape, {arguments.layers} layers, 256 tokens")
    print(f"{'':8}{'rank':>6}{'parameters':>13}{'MLP':>10}{'peak GB':>10}{'s a step':>10}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for row in arguments.rows:
            if row == "dense":
                _print(row, "", arguments, "")
        for rank in arguments.ranks:
            model = Path(directory) / f"{rank}.sct"
            files = initial_files(_written(Path(directory) / "config.json", arguments.layers))
            initialise(files, model, rank=rank, modules=r"(gate|up|down)_proj")
            for row in arguments.rows:
                if row != "dense":
                    _print(row, str(rank), arguments, str(model))
            model.unlink()


def _written(path: Path, layers: int) -> str:
    path.write_text(config(layers).to_json_string())
    return str(path)


def _print(row: str, rank: str, arguments: argparse.Namespace, model: str) -> None:
    dense = 3 * HIDDEN * INTERMEDIATE
    attention = 4 * HIDDEN * HIDDEN
    ours = 3 * int(rank) * (HIDDEN + INTERMEDIATE + 1) if rank else dense
    rest = HIDDEN * (VOCABULARY + 2 * arguments.layers + 1)
    parameters = arguments.layers * (attention + ours) + rest
    line = f"{row:8}{rank:>6}{parameters:>13,}{f'{dense / ours:.1f}x':>10}"
    if not rank and 16 * parameters > 0.9 * installed_bytes():
        print(f"{line}{16e-9 * parameters:>10.2f}  computed: weights, gradients and two moments", flush=True)
        return
    command = [sys.executable, "-m", "tests.benchmarks.ranks", "--rows", row, "--model", model]
    command += ["--layers", str(arguments.layers), "--steps", str(arguments.steps)]
    found = json.loads(in_process(command).stdout.splitlines()[-1])
    assert found["parameters"] == parameters, (found["parameters"], parameters)
    print(f"{line}{found['peak'] / 1e9:>10.2f}{found['step']:>10.2f}", flush=True)


def _measured(row: str, path: str, layers: int, steps: int) -> dict[str, float]:
    made: nn.Module | None = None
    if not path:
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config(layers), dtype=torch.float32)
        assert not any(isinstance(module, SpectralLinear) for module in made.modules())
    return measured(made if made is not None else Path(path), ROWS[row], torch.device("cpu"), steps)


if __name__ == "__main__":
    main()
