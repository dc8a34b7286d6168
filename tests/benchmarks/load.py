"""Time to load the same tensors from a .sct file and from safetensors, side by side, file in the page cache.

    python -m tests.benchmarks.load

`open` gives every tensor to torch without touching its bytes; `read` also sums them, so every byte comes in.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sctconv.formats.reader import SctFile
from sctconv.formats.writer import SctWriter
from sctconv.runtime.tensors import mapped_tensor, to_numpy
from tests.benchmarks.measure import header, median_seconds

Loader = Callable[[Path], dict[str, torch.Tensor]]


def load_sct(path: Path) -> dict[str, torch.Tensor]:
    with SctFile(path) as file:
        return {name: mapped_tensor(file, entry) for name, entry in file.index.tensors.items()}


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def load(loader: Loader, path: Path) -> None:
    loader(path)


def read(loader: Loader, path: Path) -> None:
    for tensor in loader(path).values():
        tensor.view(torch.uint8).view(-1).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    header("loading, float32, medians; ratio is .sct / safetensors")
    print("| tensors | size | what | safetensors ms | .sct ms | ratio |\n|---|---|---|---|---|---|")
    for count, side in ((300, 600), (1200, 300), (10_000, 16)):
        tensors = {f"model.layers.{place}.weight": torch.randn(side, side) for place in range(count)}
        with tempfile.TemporaryDirectory() as directory:
            sct, safe = Path(directory) / "m.sct", Path(directory) / "m.safetensors"
            save_file(tensors, safe)
            with SctWriter(sct) as writer:
                for name, tensor in tensors.items():
                    writer.add_tensor(name, to_numpy(tensor))
                writer.commit()
            size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
            del tensors
            gc.collect()
            for what, work in (("open", load), ("read", read)):
                works = (partial(work, load_safetensors, safe), partial(work, load_sct, sct))
                theirs, ours = (seconds * 1e3 for seconds in median_seconds(*works, runs=runs))
                print(
                    f"| {count} | {size:.0f} MB | {what} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
