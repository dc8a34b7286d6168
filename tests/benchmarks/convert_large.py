"""Converting made checkpoints of 70B-sized layers (8192/28672, bfloat16, several shards): two of them, and what 80 would take.

    python -m tests.benchmarks.convert_large [--keep DIRECTORY] [--calibrated] [--forecast]

Plainly, all layers; or, with --calibrated, the MLP layers on 1024 tokens of WikiText-2 valid under --max-memory 8GiB. First
what `--dry-run` says of two layers and of 80, from shards of holes that take no room; then the two.

The checkpoint (Llama's architecture, 64 heads, 8 of keys and values, a vocabulary of 128,256, untied head: 7.6 GB) is
written shard by shard into a temporary directory. The conversion runs in a process of its own, through the command
line; memory is the peak resident set by the operating system's account, every import included.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.benchmarks.measure import ROOT, header
from tests.models import WIKITEXT, tiny_tokenizer

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 8192, 28672, 128_256, 2
_ALL_LAYERS = 80


def make(directory: Path, layers: int = LAYERS, *, hollow: bool = False) -> None:
    """One shard per layer and one each for embedding and head, each matrix random and small; hollow, of holes in the file."""
    directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    torch.manual_seed(0)
    weight_map = {}
    for file, shapes in _shards(layers):
        if hollow:
            _hollow(directory / file, shapes)
        else:
            save_file({name: _made(shape) for name, shape in shapes.items()}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(layers: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    yield "model-embedding.safetensors", {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        names: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (1024, HIDDEN),
            "self_attn.v_proj": (1024, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes = {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
        yield f"model-layer-{layer}.safetensors", shapes
    yield "model-head.safetensors", {"lm_head.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}


def _made(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16) * 0.02


def _hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros that takes no room on a disk that keeps holes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="make the checkpoint here and leave it; use it if it is there")
    parser.add_argument("--calibrated", action="store_true", help="fit the MLP layers to text within 8 GiB")
    parser.add_argument("--forecast", action="store_true", help="only what a dry run says of it")
    arguments = parser.parse_args()
    kind = "calibrated" if arguments.calibrated else "plain"
    header(f"converting 70B-sized layers at rank 128, bfloat16, {kind}")
    print(
        "| layers | | source | output | layers factored | peak resident memory | seconds |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        for layers in (LAYERS, _ALL_LAYERS):
            hollow = room / f"hollow{layers}"
            make(hollow, layers, hollow=True)
            _row(layers, "forecast", hollow, room / "large.sct", calibrated=arguments.calibrated, dry_run=True)
        if not arguments.forecast:
            source = arguments.keep or room / "large"
            if not source.exists():
                make(source)
            _row(LAYERS, "measured", source, room / "large.sct", calibrated=arguments.calibrated)


def _row(layers: int, what: str, source: Path, output: Path, *, calibrated: bool, dry_run: bool = False) -> None:
    tiny_tokenizer(source)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    command = [sys.executable, "-m", "sctconv", "convert", str(source), "-o", str(output), "--rank", "128", "--json"]
    if calibrated:
        text = str(WIKITEXT.with_name("valid.txt"))
        command += ["--calibration", text, "--calibration-tokens", "1024", "--max-memory", "8GiB"]
    else:
        command += ["--data-free", "--modules", "all"]
    command += ["--dry-run"] if dry_run else ["--no-report"]
    report = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
    factored = sum(layer["rank"] is not None for layer in report["layers"])
    print(
        f"| {layers} | {what} | {size / 1e9:.2f} GB | {report['bytes'] / 1e9:.2f} GB | {factored} "
        f"| {report['peak_rss_bytes'] / 2**30:.2f} GiB | {report['seconds']:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
