"""What a decoder computes, read out of its configuration: one description for all families, from which a graph is built.

Names, sizes and constants are transformers' own. A block is

    x = x + r post_attention(attention(pre_attention(x)));   x = x + r post_mlp(mlp(pre_mlp(x)))

with any of the four norms left out, or both sums at once on the same x (`parallel`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from sctconv.errors import OptionError
from sctconv.runtime.skeleton import build_skeleton


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of one kind of layer: angles `position * inv_freq`, the first half of the dimensions with the second.

    Attributes:
        inv_freq: (rotated dimensions / 2,) float32, all scaling (llama3, yarn) included.
        scale: what cosine and sine are multiplied with.
    """

    inv_freq: np.ndarray
    scale: float = 1.0


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer.

    Attributes:
        rotary: None where a layer knows nothing of positions.
        window: tokens that a token sees, itself included; None for all before it.
    """

    rotary: Rotary | None = None
    window: int | None = None


@dataclass(frozen=True)
class Norm:
    """`rms`: x / sqrt(mean x^2 + eps) * (weight + offset); `layer`: LayerNorm with weight and bias."""

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0


@dataclass(frozen=True)
class Names:
    """Paths of modules; those within a block by their path in it, None where there is none.

    Attributes:
        qkv: one fused projection, or `q`, `k`, `v`. interleaved: the fused one has q, k and v of a head together.
        gate, up, down: a gated MLP; gate is None for a plain one; gate_up is a fused one, gate first.
        q_norm, k_norm: norms of queries and keys.
    """

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    pre_attention: str | None = "input_layernorm"
    post_attention: str | None = None
    pre_mlp: str | None = "post_attention_layernorm"
    post_mlp: str | None = None
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None
    interleaved: bool = False
    o: str = "self_attn.o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str | None = None
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class DecoderSpec:
    """See the module.

    Attributes:
        model_type: transformers' name of the family.
        hidden, heads, kv_heads, head_dim, vocabulary: sizes.
        layers: the kind of each block, in order.
        names: where things are.
        norm: of all norms.
        per_head_norm: whether q_norm and k_norm work on each head, or on all heads' dimensions at once.
        parallel: whether attention and MLP read the same x.
        activation: transformers' name of it.
        attention_scale: what scores are multiplied with; attention_softcap: c tanh(scores / c).
        tied: whether the head is the embedding where the file has no head of its own.
        embedding_scale, residual_scale, logits_scale: multipliers. logits_softcap: c tanh(logits / c).
    """

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: tuple[LayerKind, ...]
    names: Names = field(default_factory=Names)
    norm: Norm = field(default_factory=Norm)
    per_head_norm: bool = True
    parallel: bool = False
    activation: str = "silu"
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    tied: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None


def read_spec(config: Any, source: str) -> DecoderSpec:
    """The description of a causal language model.

    Args:
        config: transformers' configuration.
        source: what to call the model in an error.

    Raises:
        OptionError: no graph is known for the family, or for something that this configuration asks for.
        ModelError: transformers cannot build the model.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise OptionError(
            f"{source}: no ONNX graph is known for a {config.model_type}; there is one for {', '.join(sorted(FAMILIES))}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    spec = DecoderSpec(
        model_type=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        layers=_kinds(config, source),
        norm=Norm("rms", getattr(config, "rms_norm_eps", 1e-6)),
        activation=getattr(config, "hidden_act", "silu"),
        attention_scale=head_dim**-0.5,
        tied=bool(config.tie_word_embeddings),
    )
    spec = family(spec, config)
    if spec.activation not in ACTIVATIONS:
        raise OptionError(f"{source}: no ONNX graph is known for the activation {spec.activation}")
    return spec


ACTIVATIONS: Final = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


def _kinds(config: Any, source: str) -> tuple[LayerKind, ...]:
    """Of every layer: rotary frequencies as transformers computes them, and its window."""
    count = config.num_hidden_layers
    rotary = {
        name: module
        for name, module in build_skeleton(config, source).named_modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    }
    module = next(iter(rotary.values()), None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    window = getattr(config, "sliding_window", None)
    everywhere = window and not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True)
    without = [
        not has for has in getattr(config, "no_rope_layers", None) or [1] * count
    ]  # 1 stands for a layer with it
    kinds = []
    for kind, bare in zip(types, without, strict=True):
        if kind not in ("full_attention", "sliding_attention"):
            raise OptionError(f"{source}: no ONNX graph is known for layers of {kind}")
        angles = None
        if module is not None and not bare:
            prefix = f"{kind}_" if hasattr(module, f"{kind}_inv_freq") else ""
            inv_freq = getattr(module, f"{prefix}inv_freq").float().numpy()
            angles = Rotary(inv_freq, float(getattr(module, f"{prefix}attention_scaling", 1.0)))
        kinds.append(LayerKind(angles, window if kind == "sliding_attention" or everywhere else None))
    return tuple(kinds)


def _llama(spec: DecoderSpec, config: Any) -> DecoderSpec:
    return spec


def _qwen3(spec: DecoderSpec, config: Any) -> DecoderSpec:
    names = replace(spec.names, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    return replace(spec, names=names)


def _olmo2(spec: DecoderSpec, config: Any) -> DecoderSpec:
    names = replace(
        spec.names, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", pre_attention=None, pre_mlp=None,
        post_attention="post_attention_layernorm", post_mlp="post_feedforward_layernorm",
    )  # fmt: skip
    return replace(spec, names=names, per_head_norm=False)


def _phi3(spec: DecoderSpec, config: Any) -> DecoderSpec:
    names = replace(spec.names, qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj", gate=None)
    return replace(spec, names=names)


def _gemma(spec: DecoderSpec, config: Any) -> DecoderSpec:
    names = replace(
        spec.names, post_attention="post_attention_layernorm", pre_mlp="pre_feedforward_layernorm",
        post_mlp="post_feedforward_layernorm",
    )  # fmt: skip
    if config.model_type == "gemma3_text":
        names = replace(names, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    return replace(
        spec,
        names=names,
        norm=replace(spec.norm, offset=1.0),
        activation=config.hidden_activation,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        embedding_scale=math.sqrt(config.hidden_size),
        logits_softcap=config.final_logit_softcapping,
    )


def _granite(spec: DecoderSpec, config: Any) -> DecoderSpec:
    return replace(
        spec,
        attention_scale=config.attention_multiplier,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logits_scale=1.0 / config.logits_scaling,
    )


def _stablelm(spec: DecoderSpec, config: Any) -> DecoderSpec:
    if config.qk_layernorm:
        raise OptionError("a stablelm with qk_layernorm: no ONNX graph is known for it")
    names = replace(spec.names, pre_mlp="input_layernorm") if config.use_parallel_residual else spec.names
    return replace(spec, names=names, norm=Norm("layer", config.layer_norm_eps), parallel=config.use_parallel_residual)


def _gpt_neox(spec: DecoderSpec, config: Any) -> DecoderSpec:
    names = Names(
        embedding="gpt_neox.embed_in", blocks="gpt_neox.layers", norm="gpt_neox.final_layer_norm", head="lm_head",
        qkv="attention.query_key_value", interleaved=True, o="attention.dense", gate=None, up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    )  # fmt: skip
    return replace(spec, names=names, norm=Norm("layer", config.layer_norm_eps), parallel=config.use_parallel_residual)


def _gpt2(spec: DecoderSpec, config: Any) -> DecoderSpec:
    if config.scale_attn_by_inverse_layer_idx:
        raise OptionError("a gpt2 with scale_attn_by_inverse_layer_idx: no ONNX graph is known for it")
    names = Names(
        embedding="transformer.wte", positions="transformer.wpe", blocks="transformer.h", norm="transformer.ln_f",
        pre_attention="ln_1", pre_mlp="ln_2", qkv="attn.c_attn", o="attn.c_proj", gate=None, up="mlp.c_fc", down="mlp.c_proj",
    )  # fmt: skip
    scale = spec.attention_scale if config.scale_attn_weights else 1.0
    norm = Norm("layer", config.layer_norm_epsilon)
    return replace(spec, names=names, norm=norm, activation=config.activation_function, attention_scale=scale)


FAMILIES: Final[dict[str, Callable[[DecoderSpec, Any], DecoderSpec]]] = {
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "granite": _granite,
    "llama": _llama,
    "mistral": _llama,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _llama,
    "qwen3": _qwen3,
    "smollm3": _llama,
    "stablelm": _stablelm,
}
"""Families whose graph is known: `model_type` -> what sets it apart."""
