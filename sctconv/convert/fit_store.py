"""What a calibrated conversion has found so far, on disk: fits need not wait in memory, and a stopped one can go on.

`OUT.fits.part` is a journaled .sct file that is never committed. It takes whatever is expensive: the output metrics, the
measured ranks, and every block as the sweep has passed it, in full precision. Hidden states it does not take: they come again
by running the blocks that are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sctconv.formats.atomic import part_path
from sctconv.formats.writer import SctWriter

from .fit import DenseFit, Fit
from .metric import Metric
from .resume import JOURNAL_SECONDS, check_same
from .sweep import SweptBlock


class FitStore:
    """Keeps metrics, facts and blocks by name.

    Args:
        path: the store; it stands at `part_path(path)` until it is left without an exception, then it is removed.
        key: what decides its content, see `fingerprint`.
        resume: whether to go on from what a stopped conversion kept there.
        journal_seconds: how often what is new is kept.

    Raises:
        OptionError: what is kept there was begun with another key.
        OutputError: a stopped one stands there and `resume` is not set, or the disk is full.
    """

    def __init__(
        self, path: Path, key: Mapping[str, Any], *, resume: bool = False, journal_seconds: float = JOURNAL_SECONDS
    ) -> None:
        self._key = dict(key)
        self._out = SctWriter(path, journaled=True, resume=resume, overwrite=not resume)
        self._seconds, self._kept = journal_seconds, time.monotonic()

    def __enter__(self) -> FitStore:
        self._out.__enter__()
        try:
            if self._out.metadata:
                check_same(self._out.metadata, self._key, part_path(self._out.path))
        except BaseException as error:
            self._out.__exit__(type(error), error, error.__traceback__)
            raise
        self._facts.setdefault("resume", self._key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._out.forget()
        self._out.__exit__(kind, error, trace)

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self._out.path.absolute().parent

    @property
    def _facts(self) -> dict[str, Any]:
        return self._out.metadata

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Something that JSON holds, made unless it is there."""
        if name not in self._facts:
            self._facts[name] = make()
            self._keep()
        return self._facts[name]

    def metrics(self, make: Callable[[], Mapping[str, Metric]]) -> dict[str, Metric]:
        """The metric of each layer, made unless they are there."""
        if "metrics" not in self._facts:
            made = make()
            for layer, metric in made.items():
                for part in ("d", "Q", "g"):
                    self._put(f"{layer}.metric.{part}", getattr(metric, part))
            self._facts["metrics"] = list(made)
            self._keep()
        names = self._facts["metrics"]
        return {name: Metric(*(self._get(f"{name}.metric.{part}") for part in ("d", "Q", "g"))) for name in names}

    def put(self, block: SweptBlock) -> None:
        """Keeps a block."""
        for layer, fit in block.fits.items():
            for part in ("U", "s", "V", "weight", "bias"):
                if (value := getattr(fit, part, None)) is not None:
                    self._put(f"{layer}.{part}", value)
            self._out.add_tensor(f"{layer}.error", np.array(fit.error, "<f8"))
        for name, tensor in block.tensors.items():
            self._put(name, tensor)
        self.records.append(
            {
                "name": block.name,
                "fits": list(block.fits),
                "dense": sum(isinstance(fit, DenseFit) for fit in block.fits.values()),
                "tensors": list(block.tensors),
                "refinement": block.refinement,
            }
        )
        self._keep()

    @property
    def records(self) -> list[dict[str, Any]]:
        """What is known of the blocks that were kept, in their order: `name`, `refinement`, how many `dense` fits."""
        records: list[dict[str, Any]] = self._facts.setdefault("blocks", [])
        return records

    def block(self, name: str) -> SweptBlock | None:
        """A block that was kept; None if it was not."""
        for record in self.records:
            if record["name"] == name:
                fits = {layer: self._fit(layer) for layer in record["fits"]}
                tensors = {tensor: self._get(tensor) for tensor in record["tensors"]}
                return SweptBlock(name, fits, tensors, record["refinement"])
        return None

    def fit(self, layer: str) -> Fit | DenseFit | None:
        """The fit of a layer in a block that was kept; None if there is none."""
        return self._fit(layer) if f"{layer}.error" in self._out.tensors else None

    def tensor(self, name: str) -> Tensor | None:
        """Another tensor of a block that was kept; None if it was not changed."""
        return self._get(name) if any(name in record["tensors"] for record in self.records) else None

    def _fit(self, layer: str) -> Fit | DenseFit:
        bias = self._get(f"{layer}.bias") if f"{layer}.bias" in self._out.tensors else None
        error = float(self._out.read(f"{layer}.error"))
        if f"{layer}.weight" in self._out.tensors:
            return DenseFit(self._get(f"{layer}.weight"), bias, error)
        U, s, V = (self._get(f"{layer}.{part}") for part in "UsV")
        return Fit(U, s, V, bias, error)

    def _put(self, name: str, tensor: Tensor) -> None:
        self._out.add_tensor(name, tensor.detach().cpu().contiguous().numpy())

    def _get(self, name: str) -> Tensor:
        return torch.from_numpy(self._out.read(name).copy())

    def _keep(self) -> None:
        if time.monotonic() - self._kept >= self._seconds:
            self._out.journal()
            self._kept = time.monotonic()
