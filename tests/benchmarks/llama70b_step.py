"""A training step of Llama-3-70B's shape at rank 32: the paper's workload against the real model, memory and time.

    python -m tests.benchmarks.llama70b_step [--rows NAME ...] [--steps 2] [--device cuda]

`paper` is its recipe (arXiv 2604.00733, section 4) written anew: 80 blocks of factored linear layers on 8 random vectors, q, k
and v added in place of attention, no embedding, no head, AdamW on everything, `torch.linalg.qr` matrix by matrix. The other
rows are the architecture itself (rotary, causal softmax attention, RMSNorm, vocabulary 128,256, embedding and head factored
too) from `sctconv init`, trained by `sctconv.runtime.train.train` on windows of 256 tokens of WikiText-2 with its
cross-entropy. Each row is a process of its own; `peak` is what the operating system (or torch, on a GPU) says, `planned` what
`--plan` does; times are of the last step. `optimiser` of ours has the retraction in it, which is also given alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig

from sctconv.convert.scratch import initial_files, initialise
from sctconv.formats.atomic_dir import atomic_directory
from sctconv.runtime.memory import large_pages, peak_rss_bytes
from sctconv.runtime.skeleton import load_tokenizer
from sctconv.runtime.spectral import SpectralLinear
from sctconv.runtime.train import TrainOptions, estimate, load_data, load_weights, train
from sctconv.runtime.train.optimizer import SpectralAdam
from sctconv.sources import open_source
from tests.benchmarks.measure import ROOT, header
from tests.models import WIKITEXT, real_gguf

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY, RANK = 8192, 28672, 80, 64, 8, 128_256, 32
CONTEXT = 256

_LEAN: dict[str, Any] = {"checkpointing": "factors", "step_in_backward": True}
ROWS: dict[str, dict[str, Any] | None] = {
    "paper": None,
    "ours, no lever": {},
    "step in backward": {"step_in_backward": True},
    "checkpointing blocks": {"checkpointing": "blocks"},
    "checkpointing factors": {"checkpointing": "factors"},
    "momentum bfloat16": {"momentum": "bfloat16"},
    "momentum int8": {"momentum": "int8"},
    "weights bfloat16": {"weights": "bfloat16"},
    "lossless levers": _LEAN,
    "all levers": {**_LEAN, "momentum": "int8", "weights": "bfloat16"},
}


def config(layers: int = LAYERS) -> LlamaConfig:
    """Llama-3-70B's."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_theta=500_000.0, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


class Block(nn.Module):
    """The paper's: seven factored layers, and no attention between them."""

    def __init__(self) -> None:
        super().__init__()
        narrow = KV_HEADS * HIDDEN // HEADS
        self.q, self.o = _layer(HIDDEN, HIDDEN), _layer(HIDDEN, HIDDEN)
        self.k, self.v = _layer(HIDDEN, narrow), _layer(HIDDEN, narrow)
        self.gate, self.up = _layer(HIDDEN, INTERMEDIATE), _layer(HIDDEN, INTERMEDIATE)
        self.down = _layer(INTERMEDIATE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        repeat = HEADS // KV_HEADS
        mixed = self.q(x) + self.k(x).repeat(1, repeat) + self.v(x).repeat(1, repeat)
        x = x + self.o(mixed)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def _layer(in_: int, out: int) -> SpectralLinear:
    layer = SpectralLinear(in_, out, RANK, bias=False)
    with torch.no_grad():
        for factor in (layer.U, layer.V):
            factor.copy_(torch.linalg.qr(torch.randn(factor.shape))[0])
        layer.s.fill_(1.0)
    return layer


def paper(device: torch.device, steps: int, layers: int) -> dict[str, float]:
    """Seconds of the last step, part by part."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block().to(device) for _ in range(layers)))
    factors = [parameter for parameter in blocks.parameters() if parameter.ndim == 2]
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=5e-4)
    x, clock, marks = torch.randn(8, HIDDEN, device=device), _clock(device), [0.0]
    for _ in range(steps):
        marks = [clock()]
        loss = blocks(x).square().mean()
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(clock())
        with torch.no_grad():
            for factor in factors:
                Q, R = torch.linalg.qr(factor)
                factor.copy_(Q * torch.sign(torch.diag(R)))
        marks.append(clock())
    parts = [after - before for before, after in itertools.pairwise(marks)]
    whole = marks[-1] - marks[0]
    names = ("forward", "backward", "optimiser", "retraction")
    return {"step": whole, **dict(zip(names, parts, strict=True)), "tokens": 8.0}


def measured(source: Path | nn.Module, settings: dict[str, Any], device: torch.device, steps: int) -> dict[str, float]:
    """What `ours` finds, with the peak and the number of parameters."""
    found = ours(source, settings, device, steps)
    return {**found, "peak": _peak(device)}


def ours(source: Path | nn.Module, settings: dict[str, Any], device: torch.device, steps: int) -> dict[str, float]:
    """The same of ours, of a .sct file or a model; forward and backward are one, as with the levers they are interleaved."""
    options = chosen(settings, steps)
    clock, spent = _clock(device), {"optimiser": 0.0, "retraction": 0.0}
    _timed(SpectralAdam, "_move", clock, spent, "optimiser")
    _timed(sys.modules["sctconv.runtime.train.loop"], "retract", clock, spent, "retraction")
    tokenizer = AutoTokenizer.from_pretrained(saved_tokenizer())
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "text.txt"
        text.write_text(WIKITEXT.with_name("valid.txt").read_text(encoding="utf-8")[:8000], encoding="utf-8")
        data = load_data([str(text)], tokenizer, context=CONTEXT, held_out=0.2)
    model = source if isinstance(source, nn.Module) else load_weights(source, options.weights, device)
    marks: list[float] = []
    found: dict[str, float] = {}

    def done(progress: Any) -> None:
        marks.append(clock())
        if progress.step == steps - 1:
            spent.update(optimiser=0.0, retraction=0.0)
        elif progress.step == steps:
            found.update(spent, loss=progress.loss)

    looking = sys.modules["sctconv.runtime.train.loop"]
    looking._look = lambda *_: 0.0  # type: ignore[attr-defined]
    train(model, data, options, on_step=done)
    step = marks[-1] - marks[-2]
    both = step - found.get("optimiser", 0.0)
    counts = {"tokens": CONTEXT, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    return {"step": step, "forward + backward": both, **found, **{name: float(n) for name, n in counts.items()}}


def chosen(settings: dict[str, Any], steps: int) -> TrainOptions:
    """A row's options."""
    return TrainOptions(
        steps=steps, batch=1, micro_batch=1, context=CONTEXT, held_out=0.2, eval_every=0,
        direction="adam", embedding_rate=1e-3, **settings,
    )  # fmt: skip


def saved_tokenizer() -> Path:
    """SmolLM2's, in files as a .sct file has them: reading it from the GGUF would leave 200 MB in a row's peak."""
    place = real_gguf().with_name("tokenizer")
    if not place.exists():
        with atomic_directory(place) as made:
            load_tokenizer(open_source(str(real_gguf())).files).save_pretrained(made)  # type: ignore[union-attr]
    return place


def in_process(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a row; each of them, the baselines too, has the large pages that `sctconv train` asks for."""
    environment = {**os.environ}
    large_pages(environment)
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)


def _timed(owner: Any, name: str, clock: Callable[[], float], spent: dict[str, float], part: str) -> None:
    """Adds what a function takes to a part."""
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        before = clock()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[part] += clock() - before

    setattr(owner, name, outer)


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss_bytes() or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=2, help="the last is measured")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.model is not None:  # a row's own process
        (row,) = arguments.rows
        settings = ROWS[row]
        parts = (
            paper(device, arguments.steps, arguments.layers)
            if settings is None
            else ours(arguments.model, settings, device, arguments.steps)
        )
        print(json.dumps({**parts, "peak": _peak(device)}))
        return
    saved_tokenizer()  # before a row's process would
    header(f"a step of a 70B shape, rank {RANK}, {arguments.layers} layers, {device}")
    print(
        f"{'':24}{'peak GB':>9}{'planned':>9}{'s a step':>10}{'fwd + bwd':>11}{'optimiser':>11}{'retraction':>12}{'tokens/s':>10}{'loss':>8}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model.sct"
        for row in arguments.rows:
            if ROWS[row] is not None and not model.exists():
                (Path(directory) / "config.json").write_text(config(arguments.layers).to_json_string())
                initialise(initial_files(str(Path(directory) / "config.json")), model, rank=RANK, embeddings=True)
            command = [sys.executable, "-m", "tests.benchmarks.llama70b_step", "--rows", row, "--model", str(model)]
            command += [
                "--steps",
                str(arguments.steps),
                "--device",
                arguments.device,
                "--layers",
                str(arguments.layers),
            ]
            found = json.loads(in_process(command).stdout.splitlines()[-1])
            both = found.get("forward + backward", found.get("forward", 0.0) + found.get("backward", 0.0))
            settings = ROWS[row]
            planned = f"{'':9}"
            if settings is not None:
                planned = f"{estimate(model, chosen(settings, arguments.steps), device)['peak'] / 1e9:>9.2f}"
            loss = f"{found['loss']:>8.3f}" if "loss" in found else ""
            print(
                f"{row:24}{found['peak'] / 1e9:>9.2f}{planned}{found['step']:>10.2f}{both:>11.2f}{found['optimiser']:>11.2f}"
                f"{found['retraction']:>12.2f}{found['tokens'] / found['step']:>10.1f}{loss}",
                flush=True,
            )


if __name__ == "__main__":
    main()
