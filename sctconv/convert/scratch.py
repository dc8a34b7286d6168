"""A model from nothing but its configuration, factored from the start.

U and V are the Q of Gaussian matrices, uniform on the Stiefel manifold. All singular values are equal, as nothing is known of
them: for a dense layer whose entries have the standard deviation sigma, `s0 = sigma sqrt(m n / k)` gives W the same Frobenius
norm, so outputs have the variance that the architecture was designed for; 1, the obvious choice, is off by whatever that is.
Everything else is initialised as transformers does, one module in memory at a time.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import sctconv
from sctconv.errors import OptionError
from sctconv.formats.index import LayerRecord
from sctconv.formats.writer import SctWriter
from sctconv.runtime.retraction import householder_qr
from sctconv.runtime.skeleton import build_skeleton, embedding_shape, linear_layers, load_config
from sctconv.runtime.tensors import TORCH_DTYPES, to_numpy
from sctconv.sources import open_source
from sctconv.sources.base import check_small, read_small_files

from .options import STORAGE_DTYPES
from .plan import LayerPlan, select_layers


def initial_files(text: str, tokenizer: str | None = None) -> dict[str, bytes]:
    """Configuration and tokenizer of a model to begin: of a config.json, a directory, a checkpoint or a Hub id.

    Args:
        text: what the user named.
        tokenizer: a model whose tokenizer is taken instead.

    Raises:
        CheckpointError: it is not there or cannot be read.
    """
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".json":
        files = {"config.json": path.read_bytes()} if check_small(path) else {"config.json": b""}
    elif path.is_dir() and (path / "config.json").exists():
        files = read_small_files(path)
    else:
        files = dict(open_source(text).files)
    if tokenizer is not None:
        files = {"config.json": files["config.json"]} | {
            name: data for name, data in initial_files(tokenizer).items() if name != "config.json"
        }
    return files


def initialise(
    files: Mapping[str, bytes],
    output: str | os.PathLike[str],
    *,
    rank: int,
    modules: str = "all",
    embeddings: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    overwrite: bool = False,
    label: str = "config.json",
) -> dict[str, Any]:
    """Writes a freshly initialised factored model; nothing of a factored layer's dense shape is ever made.

    Args:
        files: config.json and, if there is one, the tokenizer.
        output: the .sct file.
        rank: of every factored layer; one that it would not shrink is initialised dense.
        modules: see `ConvertOptions`.
        embeddings: whether input embedding and head are factored too.
        dtype: `float32`, `bfloat16` or `float16`.
        seed: of all random numbers.
        overwrite: whether a file that stands at `output` may be replaced.
        label: what messages call the configuration.

    Returns:
        What was made: output, layers factored, parameters.

    Raises:
        ModelError: transformers cannot build the model. OptionError: the rank fits no layer. OutputError: the output cannot
            be written.
    """
    if rank < 1:
        raise OptionError(f"--rank {rank}: a rank is at least 1")
    config = load_config(files, label)
    model = build_skeleton(config, label)
    selected = [*(_ends(model) if embeddings else []), *select_layers(model, modules)]
    layers = {layer.name: layer for layer in selected if rank <= layer.largest_useful_rank}
    if not layers:
        raise OptionError(f"--rank {rank}: would shrink none of the layers that --modules {modules} selects")
    generator = torch.Generator().manual_seed(seed)
    stored = STORAGE_DTYPES[dtype]
    sigma = float(getattr(config.get_text_config(), "initializer_range", 0.02) or 0.02)
    parameters = 0
    with SctWriter(output, overwrite=overwrite) as out, torch.no_grad():
        for name, tensor in _tensors(model, layers, rank, sigma, generator):
            kept = "F32" if name.endswith(".s") and name[:-2] in layers else stored
            out.add_tensor(name, to_numpy(tensor.to(TORCH_DTYPES[kept])), dtype=kept)
            parameters += tensor.numel()
        for layer in layers.values():
            bias = f"{layer.name}.bias" if layer.bias else None
            out.add_layer(LayerRecord(layer.name, layer.out, layer.in_, rank, None, None, bias, stored))
        for file, data in files.items():
            out.add_file(file, data)
        out.metadata.update(
            {
                "generator": f"sctconv {sctconv.__version__}",
                "transformers": transformers.__version__,
                "initialisation": {
                    "rank": rank,
                    "modules": modules,
                    "embeddings": embeddings,
                    "seed": seed,
                    "s0": "sigma sqrt(m n / k)",
                    "sigma": sigma,
                },
                "parameters": parameters,
            }
        )
        out.commit()
    return {"output": str(output), "layers": len(layers), "parameters": parameters}


def _ends(model: Any) -> Iterator[LayerPlan]:
    """Input embedding and head as far as they can be factored; a head that is tied goes with the embedding."""
    if (found := embedding_shape(model)) is not None:
        yield LayerPlan(found[0], found[1].out, found[1].in_, False, False)
    head = model.get_output_embeddings()
    for name, shape in linear_layers(model).items():
        if model.get_submodule(name) is head and f"{name}.weight" not in model.all_tied_weights_keys:
            yield LayerPlan(name, shape.out, shape.in_, shape.bias, False)


def _tensors(
    model: Any, layers: Mapping[str, LayerPlan], rank: int, sigma: float, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model, one at a time; of tied ones the first."""
    tied = set(model.all_tied_weights_keys)
    torch.manual_seed(generator.initial_seed())
    for path, module in model.named_modules():
        if path in layers:
            layer = layers[path]
            yield f"{path}.U", _orthonormal(layer.out, rank, generator)
            yield f"{path}.s", torch.full((rank,), sigma * math.sqrt(layer.out * layer.in_ / rank))
            yield f"{path}.V", _orthonormal(layer.in_, rank, generator)
            if layer.bias:
                yield f"{path}.bias", torch.zeros(layer.out)
            continue
        names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
        wanted = [name for name in names if name not in tied]
        if not wanted:
            continue
        alone = _alone(module)
        model._init_weights(alone)
        for name in wanted:
            yield name, dict(alone.named_parameters(recurse=False))[name.rpartition(".")[2]].detach()


def _alone(module: nn.Module) -> nn.Module:
    """A copy of a module without its children, with room for its own parameters."""
    copied = copy.copy(module)
    copied._modules = {}
    copied._parameters = {
        name: None if parameter is None else nn.Parameter(torch.zeros(parameter.shape))
        for name, parameter in module._parameters.items()
    }
    return copied


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return householder_qr(torch.randn(rows, columns, generator=generator))
