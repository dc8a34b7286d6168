"""Peak memory of converting a made checkpoint of two 70B-sized layers (8192/28672, bfloat16, several shards).

    python -m tests.benchmarks.convert_large [--keep DIRECTORY] [--calibrated]

Plainly, all layers; or, with --calibrated, the MLP layers on 1024 tokens of WikiText-2 valid under --max-memory 8GiB.

The checkpoint (Llama's architecture, 64 heads, 8 of keys and values, a vocabulary of 128,256, untied head: 7.6 GB) is
written shard by shard into a temporary directory. The conversion runs in a process of its own, through the command
line; memory is the peak resident set by the operating system's account, every import included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.benchmarks.measure import ROOT, header
from tests.models import WIKITEXT, tiny_tokenizer

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 8192, 28672, 128_256, 2


def make(directory: Path) -> None:
    """One shard per layer and one each for embedding and head, each tensor random and small."""
    directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16) * 0.02

    weight_map = {}

    def shard(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    shard("model-embedding.safetensors", {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN)})
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors = {
            f"{prefix}self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": random(1024, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": random(1024, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            f"{prefix}mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE),
            f"{prefix}input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        }
        shard(f"model-layer-{layer}.safetensors", tensors)
    head = {"lm_head.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    shard("model-head.safetensors", head)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="make the checkpoint here and leave it; use it if it is there")
    parser.add_argument("--calibrated", action="store_true", help="fit the MLP layers to text within 8 GiB")
    arguments = parser.parse_args()
    keep = arguments.keep
    header(
        f"converting two 70B-sized layers at rank 128, bfloat16, {'calibrated' if arguments.calibrated else 'plain'}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        source = keep or Path(temporary) / "large"
        if not source.exists():
            make(source)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        output = Path(temporary) / "large.sct"
        tiny_tokenizer(source)
        command = [sys.executable, "-m", "sctconv", "convert", str(source), "-o", str(output), "--rank", "128"]
        if arguments.calibrated:
            text = str(WIKITEXT.with_name("valid.txt"))
            command += ["--calibration", text, "--calibration-tokens", "1024", "--max-memory", "8GiB"]
        else:
            command += ["--data-free", "--modules", "all"]
        result = subprocess.run(
            [*command, "--no-report", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        report = json.loads(result.stdout)
    print(
        "| source | output | layers factored | peak resident memory | source / peak | seconds |\n|---|---|---|---|---|---|"
    )
    peak = report["peak_rss_bytes"]
    print(
        f"| {size / 1e9:.2f} GB | {report['bytes'] / 1e9:.2f} GB | {len(report['layers'])} | {peak / 2**30:.2f} GiB "
        f"| {size / peak:.1f} | {report['seconds']:.0f} |"
    )


if __name__ == "__main__":
    main()
