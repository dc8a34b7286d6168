"""Names of element types on disk, and the numpy dtypes that hold them.

The names are those of safetensors. `bfloat16` and `float8` come from `ml_dtypes`; importing it also registers them
with numpy, without which safetensors' numpy interface refuses BF16.
"""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np

from .errors import DTypeError

DTYPES: Final[dict[str, np.dtype]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""On-disk name -> numpy dtype, little-endian."""

FLOATS: Final[frozenset[str]] = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes that a weight may have: those that a conversion may cast."""

_NAMES: Final[dict[np.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of an on-disk name.

    Raises:
        DTypeError: the name is not one of `DTYPES`.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise DTypeError(f"unknown dtype {name!r:.40}; this version knows {', '.join(DTYPES)}") from None


def dtype_name(dtype: np.dtype) -> str:
    """The on-disk name of a numpy dtype; the inverse of `numpy_dtype`.

    Raises:
        DTypeError: the dtype has no on-disk name.
    """
    try:
        return _NAMES[np.dtype(dtype).newbyteorder("<")]
    except KeyError:
        raise DTypeError(f"dtype {dtype} cannot be stored; storable are {', '.join(DTYPES)}") from None
