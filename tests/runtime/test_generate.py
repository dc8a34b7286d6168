"""Generation: the same tokens as transformers, every stop rule, and a clean end whenever the caller leaves."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers

from sctconv.runtime.generate import GenerateOptions, GenerationError, generate
from tests.models import tiny_tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, eos_token_id=256, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def _text(loaded: tuple[Any, Any], prompt: str, **options: Any) -> str:
    model, tokenizer = loaded
    return "".join(generate(model, tokenizer, tokenizer(prompt).input_ids, GenerateOptions(**options)))


def test_greedy_is_transformers_own(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer("Hello", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=256)[0, ids.input_ids.shape[1] :]
    assert _text(loaded, "Hello", max_new_tokens=20) == tokenizer.decode(expected, skip_special_tokens=True)


def test_sampling_follows_the_seed(loaded: tuple[Any, Any]) -> None:
    one, two, other = (_text(loaded, "Hello", max_new_tokens=24, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert one == two != other


def test_top_k_of_one_is_greedy(loaded: tuple[Any, Any]) -> None:
    assert _text(loaded, "Hi", max_new_tokens=12, top_k=1) == _text(loaded, "Hi", max_new_tokens=12, temperature=0.0)


@pytest.mark.parametrize("which", [0, 1])
def test_stops_at_every_eos_id(loaded: tuple[Any, Any], which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    ids = tokenizer("Hello", return_tensors="pt")
    plain = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=256)[
        0, ids.input_ids.shape[1] :
    ].tolist()
    stop = plain[3]
    others = [259, stop] if which else [stop, 259]
    monkeypatch.setattr(model.generation_config, "eos_token_id", others)
    pieces = _text(loaded, "Hello", max_new_tokens=8)
    assert pieces == tokenizer.decode(plain[: plain.index(stop) + 1], skip_special_tokens=True)


def test_leaving_early_stops_the_work(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    before = threading.active_count()
    stream = generate(model, tokenizer, tokenizer("Hello").input_ids, GenerateOptions(max_new_tokens=100))
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_a_failure_in_the_model_reaches_the_caller(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr(model, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(generate(model, tokenizer, [1, 2], GenerateOptions()))


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match="--"):
        GenerateOptions(**options)


@pytest.mark.parametrize(("ids", "message"), [([], "empty"), ([1] * 128, "128 tokens")])
def test_a_prompt_that_does_not_fit_is_refused(loaded: tuple[Any, Any], ids: list[int], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        list(generate(*loaded, ids, GenerateOptions()))
