"""What a conversion can be told; the same object for the command line and for Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from sctconv.errors import OptionError

STORAGE_DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of `--dtype` -> on-disk names."""

ALLOCATIONS: Final = ("uniform", "measured")

GROUPS: Final = ("mlp", "attention", "all")


@dataclass(frozen=True)
class ConvertOptions:
    """How to choose ranks, layers and storage. Exactly one of `rank`, `energy`, `ratio`, `target_size` and `ranks` is given.

    Attributes:
        rank: the rank of every factored layer.
        energy: the least rank of each layer that keeps this share, in (0, 1), of its outputs' energy on the calibration
            text; of ||W||_F^2 without one.
        ratio: the share of its parameters that each factored layer keeps, in (0, 1).
        target_size: bytes that the file may have at most; the largest rank for all layers that fits.
        ranks: layer -> its rank; selected layers that are not among them stay dense. See `read_ranks`.
        allocate: `uniform`, as the five above say; or `measured`, which takes only the number of parameters from them and
            gives each layer the rank that is best for the whole (needs calibration; not with energy or ranks).
        modules: `mlp`, `attention`, `all` (both), or a regular expression searched in the layers' names.
        dtype: `float32`, `bfloat16` or `float16` for every floating tensor; None keeps each tensor's own.
        device: where the SVDs run, as torch names it.
        seed: of the random start of the SVD of large matrices.
        calibration: texts to fit the factors on: paths of .txt or .jsonl files, or `hub:DATASET[:CONFIG]`; none for the
            plain truncation of each weight.
        calibration_tokens: how many tokens to fit on, over all texts.
        calibration_context: tokens in a window.
        refine: steps of gradient descent on each block after its closed form, 20 at most, and then, where the model fits
            in memory, on the whole model; 0 for none.
        refit: whether linear layers of the blocks that stay dense are fitted as well.
        bf16: whether blocks multiply in bfloat16 on the text that is fitted on; None for where the processor does so
            faster. Sums and what decides stay float32 and float64, and what is measured is measured in float32.
        max_memory: bytes that a calibrated conversion may hold; None for three quarters of the machine's.

    Raises:
        OptionError: a value is out of range, or not exactly one of the five is given.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    target_size: int | None = None
    ranks: Mapping[str, int] | None = None
    allocate: str = "uniform"
    modules: str = "mlp"
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 131_072
    calibration_context: int = 512
    refine: int = 0
    refit: bool = True
    bf16: bool | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        budgets = ("rank", "energy", "ratio", "target_size", "ranks")
        given = [f"--{name.replace('_', '-')}" for name in budgets if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise OptionError(
                f"give exactly one of --rank, --energy, --ratio, --target-size and --ranks; found {found}"
            )
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"--rank {self.rank}: a rank is at least 1")
        for name in ("energy", "ratio"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise OptionError(f"--{name} {value:g}: a share lies between 0 and 1, both excluded")
        if self.target_size is not None and self.target_size < 1:
            raise OptionError(f"--target-size {self.target_size}: a number of bytes")
        if self.allocate not in ALLOCATIONS:
            raise OptionError(f"--allocate {self.allocate}: choose one of {', '.join(ALLOCATIONS)}")
        for name, value in (("--energy", self.energy), ("--ranks", self.ranks)):
            if self.allocate == "measured" and value is not None:
                raise OptionError(f"--allocate measured and {name} both decide each layer's rank; give one of them")
        if self.refine < 0:
            raise OptionError(f"--refine {self.refine}: a number of steps")
        fitting = {
            "--allocate measured": self.allocate == "measured",
            "--refine": self.refine,
            "--max-memory": self.max_memory is not None,
        }
        for name, value in fitting.items():
            if value and not self.calibration:
                raise OptionError(f"{name} needs calibration text; give --calibration and leave out --data-free")
        for name, least in (("calibration_tokens", self.calibration_context), ("calibration_context", 2)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise OptionError(f"--{option} {getattr(self, name)}: at least {least}")
        if self.dtype is not None and self.dtype not in STORAGE_DTYPES:
            raise OptionError(f"--dtype {self.dtype}: choose one of {', '.join(STORAGE_DTYPES)}")
        if self.modules not in GROUPS:
            try:
                re.compile(self.modules)
            except re.error as error:
                raise OptionError(f"--modules {self.modules!r}: not a regular expression ({error})") from None

    @property
    def label(self) -> str:
        """A word for file names: `r128`, `e0.95`, `x0.5`, `98MB` or `ranks`."""
        for letter, value in (("r", self.rank), ("e", self.energy), ("x", self.ratio)):
            if value is not None:
                return f"{letter}{value:g}"
        if self.target_size is None:
            return "ranks"
        return f"{self.target_size / 1e6:g}MB"

    def to_json(self) -> dict[str, Any]:
        """What decides the result, for the provenance: not where it ran, and not what calibration or layers record."""
        left_out = {
            "device",
            "max_memory",
            "bf16",
            "ranks",
            *([] if self.calibration else ["allocate", "refine", "refit"]),
        }
        return {
            key: value
            for key, value in asdict(self).items()
            if value is not None and key not in left_out and not key.startswith("calibration")
        }
