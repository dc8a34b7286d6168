"""Perplexity of a converted model by how its factors were chosen, on WikiText-2 and on another domain.

    python -m tests.benchmarks.quality [--rows NAME ...] [--tokens 131072] [--keep DIRECTORY]

SmolLM2-135M-Instruct, MLP layers, the first 8192 tokens of WikiText-2 test and of Grimm's tales at context 512; calibrated
on WikiText-2 valid, or on that and the tales from their 8193rd token on in equal shares; nothing is fitted on what it is
measured on. `plain` is the SVD of each weight, `whitened` SVD-LLM's form in one forward sweep on the student's inputs, the
rest is `sctconv convert`. One call, one table; ranks are measured once for each text (`sctconv convert --dry-run
--allocate measured --json`) and taken by all rows that want them (`--ranks`).
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sctconv
from sctconv.convert import ConvertOptions, convert, make_plan
from sctconv.convert.blocks import Block
from sctconv.convert.budget import MemoryPlan
from sctconv.convert.calibrated import read_texts
from sctconv.convert.decoder import Decoder
from sctconv.convert.fit import DenseFit, Fit, Moments, Root, closed_form
from sctconv.convert.pipeline import plan_conversion
from sctconv.convert.states import States
from sctconv.convert.student import replace_
from sctconv.convert.sweep import Sweep
from sctconv.runtime.evaluate import perplexity
from sctconv.sources import open_source
from sctconv.sources.model import load_dense
from sctconv.sources.weights import DenseModel
from tests.benchmarks.measure import header
from tests.models import WIKITEXT, real_gguf

_TALES = WIKITEXT.parent.parent / "grimm" / "tales.txt"

EVALUATED = 8192
"""Tokens of each text that are measured on."""

SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "plain 128": {"rank": 128, "calibration": ()},
    "whitened 128": {"rank": 128},
    "anchored 128": {"rank": 128},
    "anchored 128, mixed text": {"rank": 128, "mixed": True},
    "anchored 128, no refit": {"rank": 128, "refit": False},
    "measured 128": {"rank": 128, "allocate": "measured"},
    "measured 128, mixed text": {"rank": 128, "allocate": "measured", "mixed": True},
    "measured 128, refined": {"rank": 128, "allocate": "measured", "refine": 30},
    "measured 128, refined, mixed text": {"rank": 128, "allocate": "measured", "refine": 30, "mixed": True},
    "whitened 256": {"rank": 256},
    "anchored 256": {"rank": 256},
    "anchored 256, mixed text": {"rank": 256, "mixed": True},
}


class Whitened(Sweep):
    """SVD-LLM's form: every layer reproduces its own outputs on the student's inputs; nothing looks at the teacher."""

    def _fit_group(
        self, block: Block, group: list[str], states: States, seen: Any
    ) -> Iterator[tuple[str, Fit | DenseFit]]:
        from sctconv.convert.blocks import tapped

        K: Any = 0.0
        with tapped(block.module, [group[0]]) as taps:
            for number, state in enumerate(states):
                self._report(block.name)
                block.run(state)
                x = taps.inputs[group[0]][self._is_fit[number]].flatten(0, -2)
                K = K + (x.T @ x).double()
        for name in group:
            W, rank = block.weight(name), self._ranks[f"{block.name}.{name}"]
            yield name, closed_form(Moments(K, K, 1.0, 1, W=W), rank, prior=W, root=Root.of(K, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--keep", type=Path, help="leave the converted files here")
    arguments = parser.parse_args()
    header("Perplexity by how the factors were chosen")
    print(f"{arguments.tokens} calibration tokens, seed 0")
    print(f"{'':34}{'WikiText-2':>14}{'Grimm':>14}{'factored':>10}{'seconds':>9}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.keep or Path(temporary)
        directory.mkdir(exist_ok=True)
        measure = _measures(directory)
        for row in arguments.rows:
            _row(row, directory, arguments.tokens, measure)


def _measures(directory: Path) -> Callable[[Any], list[float]]:
    """Writes what of the tales is calibrated on, and returns how a model is measured."""
    tokenizer = load_dense(open_source(str(real_gguf()))).tokenizer
    ids = []
    for path in (WIKITEXT, _TALES):
        encoded = tokenizer(path.read_text(encoding="utf-8"), return_offsets_mapping=True, verbose=False)
        ids.append(encoded.input_ids[:EVALUATED])
        rest = path.read_text(encoding="utf-8")[encoded.offset_mapping[EVALUATED][0] :]
    (directory / "tales.txt").write_text(rest, encoding="utf-8")
    return lambda model: [perplexity(model, some).perplexity for some in ids]


def _row(row: str, directory: Path, tokens: int, measure: Callable[[Any], list[float]]) -> None:
    source = open_source(str(real_gguf()))
    start = time.perf_counter()
    settings = dict(SETTINGS[row])
    if not settings:
        model, factored = load_dense(source).model, 0
    else:
        texts = (
            str(WIKITEXT.with_name("valid.txt")),
            *([str(directory / "tales.txt")] if settings.pop("mixed", False) else []),
        )
        options = ConvertOptions(**{"calibration": texts, "calibration_tokens": tokens, **settings})
        if options.allocate == "measured":
            options = replace(options, rank=None, allocate="uniform", ranks=_measured_ranks(options))
            start = time.perf_counter()
        make = _whitened if row.startswith("whitened") else _converted
        model, factored = make(source, options, directory / f"{row.replace(',', '').replace(' ', '-')}.sct")
    seconds = time.perf_counter() - start
    figures = "".join(f"{value:>14.2f}" if value < 1e5 else f"{value:>14.3g}" for value in measure(model))
    print(f"{row:34}{figures}{factored / 1e6:>9.2f}M{seconds:>9.0f}", flush=True)


@functools.cache
def _ranks(options: ConvertOptions) -> dict[str, int]:
    start = time.perf_counter()
    plan, _ = plan_conversion(open_source(str(real_gguf())), options)
    print(f"{'(measuring ranks)':72}{time.perf_counter() - start:>9.0f}", flush=True)
    return {layer.name: layer.rank for layer in plan.layers.values() if layer.rank}


def _measured_ranks(options: ConvertOptions) -> dict[str, int]:
    return _ranks(replace(options, refine=0))


def _converted(source: Any, options: ConvertOptions, path: Path) -> tuple[Any, int]:
    report = convert(source, path, options, overwrite=True)
    return sctconv.load(path).model, sum(record.rank * (record.out + record.in_ + 1) for record in report.layers) + sum(
        layer.out * layer.in_ for layer in report.dense
    )


def _whitened(source: Any, options: ConvertOptions, path: Path) -> tuple[Any, int]:
    dense = DenseModel(source)
    layers = list(make_plan(dense, replace(options, calibration=())).layers.values())
    sweep = Whitened(
        Decoder(dense, [layer.name for layer in layers]),
        {layer.name: layer.rank for layer in layers if layer.rank},
        read_texts(dense, options),
        MemoryPlan(),
    )
    model = load_dense(source).model
    with torch.no_grad():
        for block in sweep.run():
            for name, fit in block.fits.items():
                replace_(model, name, fit)
    return model, sum(layer.parameters for layer in layers)


if __name__ == "__main__":
    main()
