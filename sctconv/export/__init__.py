"""Factored models for other runtimes."""

from .onnx_dir import ExportOptions, ExportReport, export_onnx

__all__ = ["ExportOptions", "ExportReport", "export_onnx"]
