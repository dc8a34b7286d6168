"""A transformers model without its weights, and the linear layers in it.

The model code is transformers' own, so any causal language model that it knows can be converted and run with the
same numbers. Parameters are on the meta device (no memory); buffers are real, as rotary frequencies and the like are
computed by the constructor and stand in no checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from sctconv.formats.checkpoint import one_line

from .config import ModelError as ModelError
from .config import Shapes, named_code, read_config
from .spectral import SpectralEmbedding, SpectralLinear

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What may make up a tokenizer in a Hugging Face directory."""

GENERIC_TOKENIZER: Final = "TokenizersBackend"
"""The `tokenizer_class` of a tokenizer that is what its tokenizer.json says and nothing else."""


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of a model: y = x W^T + b with W (out, in). `transposed`: stored as W^T, GPT-2's Conv1D."""

    out: int
    in_: int
    bias: bool
    transposed: bool


@contextlib.contextmanager
def directory_of(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary directory with these files, for the loaders of transformers that want one."""
    with tempfile.TemporaryDirectory(prefix="sctconv-") as directory:
        for name, data in files.items():
            (Path(directory) / name).write_bytes(data)
        yield Path(directory)


def load_config(files: Mapping[str, bytes], source: str, shapes: Shapes | None = None) -> Any:
    """The transformers configuration in `config.json`.

    Args:
        files: a model's small files; `config.json` must be among them.
        source: what to call the model in an error.
        shapes: those of the model's tensors, where they are known; see `read_config`.

    Raises:
        ModelError: the file is missing or not JSON, its sizes cannot be those of the model, or transformers does not know
            the architecture.
    """
    if "config.json" not in files:
        raise ModelError(f"{source}: has no config.json")
    item = read_config(files["config.json"], source, shapes)
    if item.get("model_type") not in transformers.CONFIG_MAPPING and (code := named_code(files["config.json"])):
        raise ModelError(
            f"{source}: a {item.get('model_type')!r:.80} needs code of its own ({code!r:.80}), which is never run; only models "
            f"that transformers {transformers.__version__} knows itself are converted and run"
        )
    with directory_of({"config.json": json.dumps(item).encode()}) as directory:
        try:
            return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # transformers raises what it likes here; its first line says the most
            raise ModelError(
                f"{source}: transformers {transformers.__version__} refuses its config.json: "
                f"{_line(error).replace(str(directory), 'it')}"
            ) from None


def build_skeleton(config: Any, source: str) -> Any:
    """The model that a configuration describes, parameters on the meta device, buffers real, in eval mode.

    The class is the one that `architectures` names if transformers has it, else that of the causal language model.

    Raises:
        ModelError: transformers has no such model or cannot build it.
    """
    names = config.architectures if isinstance(config.architectures, list) else []
    named: Any = getattr(transformers, str(names[0]), None) if names else None
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    try:
        with _parameters_on_meta():
            if is_model:
                model = named._from_config(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{source}: transformers cannot build a {config.model_type} of this config: {_line(error)}"
        ) from None
    return model.eval()


def load_tokenizer(files: Mapping[str, bytes]) -> Any | None:
    """The tokenizer that these files make, or None if there is none among them.

    Raises:
        ModelError: they do not make one.
    """
    used = {name: files[name] for name in TOKENIZER_FILES if name in files}
    if not set(used) - {"chat_template.jinja", "chat_template.json"}:
        return None
    if "config.json" in files:  # which AutoTokenizer looks into
        used["config.json"] = json.dumps(read_config(files["config.json"], "the tokenizer")).encode()
    with directory_of(used) as directory:
        try:
            # AutoTokenizer overrules the class that the files name for some kinds of model
            if _tokenizer_setting(files, "tokenizer_class") == GENERIC_TOKENIZER:
                return transformers.PreTrainedTokenizerFast.from_pretrained(directory)
            return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers, in Rust
                raise
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"the tokenizer needs code of its own ({_tokenizer_setting(files, 'auto_map')!r:.120}), which is never run"
                ) from None
            raise ModelError(f"the tokenizer cannot be loaded: {_line(error)}") from None


def _tokenizer_setting(files: Mapping[str, bytes], name: str) -> Any:
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    return settings.get(name) if isinstance(settings, dict) else None


def linear_layers(model: nn.Module) -> dict[str, LinearShape]:
    """The layers that can be factored: module path -> shape, in the model's order.

    Only `nn.Linear` itself and GPT-2's Conv1D count; a subclass may compute something else from its weight.
    """
    layers = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            layers[name] = LinearShape(module.out_features, module.in_features, module.bias is not None, False)
        elif type(module) is Conv1D:
            layers[name] = LinearShape(module.nf, module.nx, True, True)
    return layers


def embedding_shape(model: Any) -> tuple[str, LinearShape] | None:
    """Path and table (vocabulary, width) of the input embedding, if it is one that can be factored.

    A subclass of `nn.Embedding` may do more than look up, and one that is not the model's input means something else.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Embedding and module is model.get_input_embeddings():
            return name, LinearShape(module.num_embeddings, module.embedding_dim, False, False)
    return None


def factor_(model: Any, ranks: Mapping[str, int], dtype: torch.dtype | None = None) -> None:
    """Replaces linear layers by `SpectralLinear` of the given ranks, on the meta device.

    The input embedding becomes a `SpectralEmbedding`, and with it the head that is tied to it.

    Raises:
        ModelError: the model has no such layer.
    """
    shapes = linear_layers(model)
    embedding = embedding_shape(model)
    for name, rank in ranks.items():
        if embedding is not None and name == embedding[0]:
            table = embedding[1]
            _put(model, name, SpectralEmbedding(table.in_, table.out, rank, device="meta", dtype=dtype))
            _tie_factors_(model, name, rank, dtype)
            continue
        if name not in shapes:
            raise ModelError(f"the model has no linear layer {name!r} to replace by factors")
        shape = shapes[name]
        _put(model, name, SpectralLinear(shape.in_, shape.out, rank, shape.bias, device="meta", dtype=dtype))


def _tie_factors_(model: Any, embedding: str, rank: int, dtype: torch.dtype | None) -> None:
    """What was tied to the embedding's weight is factored too and tied to its factors."""
    tied = model.all_tied_weights_keys
    for target in [target for target, source in tied.items() if source == f"{embedding}.weight"]:
        head = target.removesuffix(".weight")
        shape = linear_layers(model)[head]
        _put(model, head, SpectralLinear(shape.in_, shape.out, rank, shape.bias, device="meta", dtype=dtype))
        del tied[target]
        tied.update({f"{head}.{letter}": f"{embedding}.{letter}" for letter in "UsV"})


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, a parameter goes to the meta device the moment a module registers it; buffers stay real.

    `torch.device("meta")` would take the buffers along, and transformers recomputes them only within from_pretrained.
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"
