"""The converted model is the dense model with truncated weights, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sctconv
from sctconv import SctFile
from sctconv.convert import ConvertOptions, convert
from sctconv.runtime.skeleton import linear_layers
from tests.models import FAMILIES, logits, save, tiny_model


def _convert(source: Path, rank: int, **kwargs: Any) -> Path:
    output = source.with_suffix(f".{rank}.sct")
    convert(str(source), output, ConvertOptions(rank=rank, modules="all"), must_shrink=False, **kwargs)
    return output


def _full_ranks(model: Any) -> int:
    return max(min(shape.out, shape.in_) for shape in linear_layers(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_dense_logits(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    source = save(model, tmp_path / family)
    path = _convert(source, 32)
    loaded = sctconv.load(path).model
    with SctFile(path) as file:
        assert file.index.layers, "nothing was factored"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_gives_the_logits_of_truncated_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    loaded = sctconv.load(_convert(save(model, tmp_path / family), 7)).model
    with torch.no_grad():
        for name, shape in linear_layers(model).items():
            if type(loaded.get_submodule(name)) is sctconv.SpectralLinear:
                weight = model.get_submodule(name).weight
                U, s, Vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
                weight.copy_(torch.from_numpy((U[:, :7] * s[:7]) @ Vt[:7]))
                assert shape.in_ > 7
    expected = logits(model)
    assert (expected - logits(tiny_model(family))).abs().max() > 1e-2, "truncation must be seen in the logits"
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_on_the_meta_device(family: str, tmp_path: Path) -> None:
    loaded = sctconv.load(_convert(save(tiny_model(family), tmp_path / family), 5)).model
    left = [name for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()) if tensor.is_meta]
    assert left == []
