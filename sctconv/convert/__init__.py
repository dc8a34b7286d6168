"""Dense checkpoint in, .sct file out."""

from .options import ConvertOptions
from .pipeline import ConvertReport, convert
from .plan import LayerPlan, Plan, make_plan

__all__ = ["ConvertOptions", "ConvertReport", "LayerPlan", "Plan", "convert", "make_plan"]
