"""Small GGUF files, written with the gguf package the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

_ARCHES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}


def write_gguf(
    model: Any, family: str, path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
) -> Path:
    """Writes a tiny transformers model as GGUF: names, the permuted rows of llama, gemma's norms plus one."""
    config = model.config
    writer = gguf.GGUFWriter(path, _ARCHES[family])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"] if "full_attention" in rope else rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if family == "llama":
        writer.add_rope_dimension_count(head_dim)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    _tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(writer_arch(family), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = _permute(array, heads)
        if family == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        stem, _, suffix = name.rpartition(".")
        target = f"{names.get_name(stem)}.{suffix}"
        if array.ndim == 1:
            writer.add_tensor(target, np.ascontiguousarray(array))
        else:
            data = gguf.quantize(np.ascontiguousarray(array), kind)
            writer.add_tensor(target, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def writer_arch(family: str) -> gguf.MODEL_ARCH:
    """gguf's enumeration of a family."""
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHES[family])


def _permute(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head's rotary dimensions."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    letters = [chr(place) for place in range(33, 124)]
    tokens = [*letters, "ab", "cd", "<end>", "<s>", "</s>"]
    assert len(tokens) == size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(94)
    writer.add_eos_token_id(95)
    writer.add_eot_token_id(93)
    writer.add_unk_token_id(93)
