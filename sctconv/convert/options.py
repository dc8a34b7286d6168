"""What a conversion can be told; the same object for the command line and for Python."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from sctconv.errors import OptionError

STORAGE_DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of `--dtype` -> on-disk names."""

GROUPS: Final = ("mlp", "attention", "all")


@dataclass(frozen=True)
class ConvertOptions:
    """How to choose ranks, layers and storage. Exactly one of `rank`, `energy` and `ratio` is given.

    Attributes:
        rank: the rank of every factored layer.
        energy: the least rank of each layer that keeps this share of ||W||_F^2, in (0, 1).
        ratio: the share of its parameters that each factored layer keeps, in (0, 1).
        modules: `mlp`, `attention`, `all` (both), or a regular expression searched in the layers' names.
        dtype: `float32`, `bfloat16` or `float16` for every floating tensor; None keeps each tensor's own.
        device: where the SVDs run, as torch names it.
        seed: of the random start of the SVD of large matrices.
        calibration: texts to fit the factors on: paths of .txt or .jsonl files, or `hub:DATASET[:CONFIG]`; none for the
            plain truncation of each weight.
        calibration_tokens: how many tokens to fit on, over all texts.
        calibration_context: tokens in a window.

    Raises:
        OptionError: a value is out of range, or not exactly one of the three is given.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    modules: str = "mlp"
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 131_072
    calibration_context: int = 512

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none of them"
            raise OptionError(f"give exactly one of --rank, --energy and --ratio; found {found}")
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"--rank {self.rank}: a rank is at least 1")
        for name in ("energy", "ratio"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise OptionError(f"--{name} {value:g}: a share lies between 0 and 1, both excluded")
        if self.calibration and self.energy is not None:
            raise OptionError("--energy is of the weights alone; with --calibration give --rank or --ratio")
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
        """A word for file names: `r128`, `e0.95` or `x0.5`."""
        for letter, value in (("r", self.rank), ("e", self.energy), ("x", self.ratio)):
            if value is not None:
                return f"{letter}{value:g}"
        raise AssertionError("one of the three is given")

    def to_json(self) -> dict[str, Any]:
        """What decides the result, for the provenance: everything but the device and what calibration records itself."""
        return {
            key: value
            for key, value in asdict(self).items()
            if value is not None and key != "device" and not key.startswith("calibration")
        }
