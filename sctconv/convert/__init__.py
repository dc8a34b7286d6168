"""Dense checkpoint in, .sct file out. Names load when first used: options are checked before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import ConvertOptions

if TYPE_CHECKING:
    from .pipeline import ConvertReport, convert
    from .plan import LayerPlan, Plan, make_plan

_LAZY = {"ConvertReport": "pipeline", "convert": "pipeline", "LayerPlan": "plan", "Plan": "plan", "make_plan": "plan"}

__all__ = ["ConvertOptions", "ConvertReport", "LayerPlan", "Plan", "convert", "make_plan"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
