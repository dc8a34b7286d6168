"""A model's config.json, held against limits and against the checkpoint before anything is built of it.

transformers takes the numbers as they are: a list entry or a module for each of `num_hidden_layers`, a dictionary entry for
each of `num_labels`, a tensor of `hidden_size`. And it takes names: of classes in files beside the configuration
(`auto_map`), of kernels on the Hub (`_attn_implementation`). The numbers are checked, and those names are never passed on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from sctconv.formats.checkpoint import one_line
from sctconv.formats.errors import SctError
from sctconv.formats.layout import MAX_NESTING

MAX_CONFIG_BYTES: Final = 16 << 20
MAX_LAYERS: Final = 4096
MAX_LABELS: Final = 1 << 16
MAX_SIZE: Final = 1 << 24
"""Of widths, vocabularies and positions; the longest context that a model is published with is 10 million."""

LAYERS: Final = frozenset(
    {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"}
)
WIDTHS: Final = frozenset(
    {"hidden_size", "intermediate_size", "vocab_size", "n_embd", "d_model", "d_ff", "ffn_dim", "head_dim"}
    | {"num_attention_heads", "num_key_value_heads", "n_head", "n_heads"}
)
"""Each is a dimension of some tensor of the model, or divides one."""

_OTHER_SIZES: Final = frozenset(
    {"n_inner", "d_kv", "num_heads", "embedding_size", "hidden_dim", "word_embed_proj_dim", "type_vocab_size"}
    | {"moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts", "vocab_size_per_layer_input"}
    | {"max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"}
    | {"num_channels", "image_size", "patch_size", "state_size", "conv_kernel", "original_max_position_embeddings"}
)
_CODE: Final = frozenset(
    {"auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
)
_SAME_MODEL: Final = ("", "text_config")  # the parts of a configuration whose tensors must be there

Shapes = Collection[tuple[int, ...]]


class ModelError(SctError):
    """transformers cannot build the model that the configuration describes."""


def read_config(data: bytes, source: str, shapes: Shapes | None = None) -> dict[str, Any]:
    """Parses config.json and checks the sizes in it.

    Args:
        data: its content.
        source: what to call the model in an error.
        shapes: those of the checkpoint's tensors, where there is one.

    Returns:
        What it says, but for names of code: see `without_code`.

    Raises:
        ModelError: it is too large, not JSON, no object, nested too deeply, holds NaN, or a size cannot be.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise ModelError(f"{source}: config.json has {len(data)} bytes, more than the {MAX_CONFIG_BYTES} of any model")
    try:
        item = json.loads(data, parse_constant=_constant)
        parts = list(_parts(item))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: config.json cannot be read ({one_line(error)})") from None
    if not isinstance(item.get("model_type", ""), str):
        raise ModelError(f"{source}: config.json says model_type {item['model_type']!r:.80}, which is no name")
    for path, part in parts:
        check_sizes(part, f"{source}: config.json", shapes if path in _SAME_MODEL else None)
    return without_code(item)


def check_sizes(sizes: Mapping[str, Any], source: str, shapes: Shapes | None) -> None:
    """Refuses sizes that no model has, or not the model whose tensors have these shapes.

    Args:
        sizes: by the names of transformers; what is no integer, or unknown, is passed over.
        source: whose they are, for the error.
        shapes: of the model's tensors; None where they are not known.

    Raises:
        ModelError: names the size, the number and the limit.
    """
    widest = max((size for shape in shapes for size in shape), default=0) if shapes else MAX_SIZE
    for name, value in sizes.items():
        if type(value) is not int:
            continue
        if name in LAYERS:
            most, why = MAX_LAYERS, f"{MAX_LAYERS} is the most"
            if shapes and len(shapes) < most:
                most, why = len(shapes), f"the checkpoint has {len(shapes)} tensors"
        elif name in WIDTHS:
            most, why = MAX_SIZE, f"{MAX_SIZE} is the most"
            if shapes and _room(widest) < most:
                most, why = _room(widest), f"no tensor of the checkpoint is wider than {widest}"
        elif name in _OTHER_SIZES or name == "num_labels":
            most = MAX_LABELS if name == "num_labels" else MAX_SIZE
            why = f"{most} is the most"
        else:
            continue
        if value > most:
            raise ModelError(f"{source} says {name} {_short(value)}, but {why}")
        if value < 0 or (value == 0 and name in LAYERS | WIDTHS):
            raise ModelError(f"{source} says {name} {_short(value)}, which no model has")
    heads, shared = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    if type(heads) is int and type(shared) is int and heads % shared:
        raise ModelError(f"{source} says num_attention_heads {heads}, no multiple of num_key_value_heads {shared}")


def without_code(config: Any) -> Any:
    """A configuration without the names of code that transformers would look for beside it or on the Hub."""
    if isinstance(config, dict):
        return {name: without_code(value) for name, value in config.items() if name not in _CODE}
    return [without_code(value) for value in config] if isinstance(config, list) else config


def named_code(data: bytes) -> str | None:
    """The class of its own that a configuration names for itself, if it does: `configuration_x.XConfig`."""
    item = json.loads(data)
    classes = item.get("auto_map") if isinstance(item, dict) else None
    named = classes.get("AutoConfig") if isinstance(classes, dict) else None
    return named if isinstance(named, str) else None


def _parts(item: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a configuration with their keys' path: that itself, `text_config`, `text_config.rope_scaling`."""
    if not isinstance(item, dict):
        raise ValueError(f"is {type(item).__name__}, not an object")
    level = [("", item)]
    for _ in range(MAX_NESTING):
        yield from ((path, value) for path, value in level if isinstance(value, dict))
        level = [inner for path, value in level for inner in _inner(path, value)]
    if level:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels")


def _inner(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return ((f"{path}.{key}".lstrip("."), inner) for key, inner in items if isinstance(inner, (dict, list)))


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no number")
    return float(text)  # some models have Infinity in theirs


def _room(widest: int) -> int:
    """A size that is wrong by little is left to the comparison of shapes, which names the tensor."""
    return max(1024, 4 * widest)


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**20 else "of over 20 digits"
