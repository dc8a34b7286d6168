"""Language models whose linear layers are kept as truncated SVD factors: convert, run, train, export.

This runs on every import, `sctconv --help` included, so it holds the version and names that load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .formats.reader import SctFile
    from .runtime.model import load
    from .runtime.spectral import SpectralLinear

__version__ = "0.1.0"

_LAZY = {
    "SctFile": "sctconv.formats.reader",
    "SpectralLinear": "sctconv.runtime.spectral",
    "load": "sctconv.runtime.model",
}

__all__ = ["SctFile", "SpectralLinear", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
