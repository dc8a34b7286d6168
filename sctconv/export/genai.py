"""`genai_config.json`: what onnxruntime-genai wants to know of an exported directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from .decoder_spec import DecoderSpec

FILE: Final = "genai_config.json"


def write_genai_config(directory: Path, spec: DecoderSpec) -> None:
    """Writes it beside the graph; greedy unless the model's own generation_config.json says otherwise.

    Args:
        directory: where the graph is, with config.json and perhaps generation_config.json beside it.
        spec: the model's description.
    """
    config, generation = (_read(directory / name) for name in ("config.json", "generation_config.json"))
    longest = config.get("max_position_embeddings") or config.get("n_positions") or 2048
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    first = eos[0] if isinstance(eos, list) and eos else eos
    ids = {
        "bos_token_id": generation.get("bos_token_id", config.get("bos_token_id")),
        "eos_token_id": eos,
        "pad_token_id": generation.get("pad_token_id", config.get("pad_token_id", first)),
    }
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": spec.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        **{name: value for name, value in ids.items() if value is not None},
        "context_length": longest,
        "decoder": decoder,
        "type": "decoder",  # any decoder with these names, whatever its family
        "vocab_size": spec.vocabulary,
    }
    chosen = {name: generation[name] for name in ("temperature", "top_k", "top_p") if generation.get(name) is not None}
    search = {
        "do_sample": bool(generation.get("do_sample", False)), "max_length": longest, "min_length": 0, "num_beams": 1,
        "num_return_sequences": 1, "past_present_share_buffer": True, "repetition_penalty": 1.0, **chosen,
    }  # fmt: skip
    (directory / FILE).write_text(json.dumps({"model": model, "search": search}, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
