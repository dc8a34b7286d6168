"""Fits in the place of a model's layers, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sctconv.runtime.spectral import SpectralLinear

from .fit import DenseFit, Fit, sct_form


def fits_of(module: nn.Module, fits: Mapping[str, Fit | DenseFit]) -> Iterator[tuple[str, Fit | DenseFit]]:
    """What tuning has made of fitted layers, in SCT form again; `error` stays what the closed form's was."""
    for name, before in fits.items():
        layer: Any = module.get_submodule(name)
        bias = layer.bias.detach().double() if layer.bias is not None else None
        if isinstance(layer, SpectralLinear):
            U, s, V = (factor.detach().double() for factor in (layer.U, layer.s, layer.V))
            U, s, V = (factor.float() for factor in sct_form(U * s, V))
            yield name, Fit(U, s, V, bias, before.error)
        else:
            yield name, DenseFit(layer.weight.detach().clone(), bias, before.error)


def replace_(module: nn.Module, name: str, fit: Fit | DenseFit) -> None:
    """Puts a fit in a layer's place."""
    parent, _, child = name.rpartition(".")
    layer: nn.Module
    if isinstance(fit, Fit):
        layer = SpectralLinear(fit.V.shape[0], fit.U.shape[0], len(fit.s), bias=fit.bias is not None, device="meta")
        factors = {"U": fit.U, "s": fit.s, "V": fit.V}
    else:
        m, n = fit.weight.shape
        layer = nn.Linear(n, m, bias=fit.bias is not None, device="meta")
        factors = {"weight": fit.weight}
    if fit.bias is not None:
        factors["bias"] = fit.bias.float()
    layer.load_state_dict(factors, assign=True)
    setattr(module.get_submodule(parent), child, layer.requires_grad_(False))
