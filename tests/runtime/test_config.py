"""config.json is held against limits and the checkpoint before anything is built of it, and names of code go no further."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
import transformers

from sctconv.runtime.config import MAX_CONFIG_BYTES, ModelError, check_sizes, read_config
from sctconv.runtime.skeleton import build_skeleton, load_config, load_tokenizer
from tests.models import CONFIGS, FAMILIES, tiny_model

SHAPES = [(96, 32), (64, 32), (32, 64), (32,)] * 12


def config(family: str = "llama", **changes: Any) -> bytes:
    """A family's config.json with some keys changed; `...` takes one away."""
    item = {**CONFIGS[family]().to_dict(), "model_type": CONFIGS[family]().model_type, **changes}
    return json.dumps({name: value for name, value in item.items() if value is not ...}).encode()


def refused(data: bytes, message: str, shapes: Any = SHAPES) -> None:
    """In one line, at no cost."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=message) as caught:
            build_skeleton(load_config({"config.json": data}, "tiny", shapes), "tiny")
        assert tracemalloc.get_traced_memory()[1] < max(64 << 20, 4 * len(data))
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert text.startswith("tiny: ") and text.isprintable() and len(text) < 500


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_taken_as_it_is(family: str) -> None:
    model = tiny_model(family)
    shapes = [tuple(tensor.shape) for tensor in model.state_dict().values()]
    built = build_skeleton(load_config({"config.json": config(family)}, "tiny", shapes), "tiny")
    assert [tuple(tensor.shape) for tensor in built.state_dict().values()] == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, "says hidden_size 1000000000, but no tensor of the checkpoint is wider than 96"),
        ({"hidden_size": 1 << 62}, "says hidden_size 4611686018427387904, but no tensor"),
        ({"hidden_size": 10**400}, "says hidden_size of over 20 digits, but no tensor"),
        ({"hidden_size": 0}, "says hidden_size 0, which no model has"),
        ({"hidden_size": -32}, "says hidden_size -32, which no model has"),
        ({"hidden_size": "32"}, "expected int, got str"),
        ({"hidden_size": 32.5}, "expected int, got float"),
        ({"intermediate_size": 10**8}, "says intermediate_size 100000000, but no tensor"),
        ({"vocab_size": 10**12}, "says vocab_size 1000000000000, but no tensor"),
        ({"vocab_size": -1}, "says vocab_size -1"),
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1000000000, but the checkpoint has 48 tensors"),
        ({"num_hidden_layers": 49}, "says num_hidden_layers 49, but the checkpoint has 48 tensors"),
        ({"num_hidden_layers": -5}, "says num_hidden_layers -5"),
        ({"num_hidden_layers": 0}, "says num_hidden_layers 0"),
        ({"num_attention_heads": 0}, "says num_attention_heads 0"),
        ({"num_attention_heads": 10**9}, "says num_attention_heads 1000000000"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            r"hidden size \(32\) is not a multiple of .* heads \(5\)",
        ),
        ({"num_key_value_heads": 3}, "says num_attention_heads 4, no multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "says num_key_value_heads 0"),
        ({"head_dim": 0}, "says head_dim 0"),
        ({"head_dim": 7}, "even rotary dimension"),
        ({"max_position_embeddings": 10**12}, "says max_position_embeddings 1000000000000, but 16777216 is the most"),
        ({"num_labels": 10**9}, "says num_labels 1000000000, but 65536 is the most"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "says num_hidden_layers 1000000000, but the checkpoint"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "says num_hidden_layers 1000000000, but 4096 is the most"),
        ({"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}}, "evil"),
        ({"rms_norm_eps": float("nan")}, "NaN is no number"),
        ({"x": [[float("nan")]]}, "NaN is no number"),
        ({"hidden_act": "evil"}, "evil"),
        ({"dtype": "\x1b[2J"}, "has no attribute"),
        ({"model_type": "frobnicator"}, "frobnicator"),
        ({"model_type": 5}, "says model_type 5, which is no name"),
        ({"model_type": []}, "says model_type .., which is no name"),
        ({"architectures": ["BertModel"]}, "cannot build a llama"),
    ],
)
def test_a_config_that_lies_is_refused_before_anything_is_built(changes: dict[str, Any], message: str) -> None:
    refused(config(**changes), message)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 10 << 20},
        {"num_labels": 1000},
        {"vision_config": {"num_hidden_layers": 48, "hidden_size": 4096}},
        {"bos_token_id": 10**9, "rope_theta": 10**9, "seed": 1 << 62, "total_parameters": 10**12},
        {"time_step_limit": [0.0, float("inf")]},
        {"architectures": None},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [5]},
        {"architectures": {"a": 1}},
        {"architectures": ["pipeline"]},
    ],
)
def test_what_is_only_unusual_is_taken(changes: dict[str, Any]) -> None:
    built = build_skeleton(load_config({"config.json": config(**changes)}, "tiny", SHAPES), "tiny")
    assert isinstance(built, transformers.LlamaForCausalLM)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "config.json cannot be read"),
        (b"\xff\xfe", "config.json cannot be read"),
        (b"[]", "is list, not an object"),
        (b"null", "is NoneType, not an object"),
        (b'"llama"', "is str, not an object"),
        (b"{" * 9, "config.json cannot be read"),
        (b"[" * 1_000_000, "config.json cannot be read"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "nested deeper than 64 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json cannot be read"),
        (b" " * (MAX_CONFIG_BYTES + 1), "more than the 16777216 of any model"),
    ],
)
def test_what_is_no_configuration_is_refused(data: bytes, message: str) -> None:
    refused(data, message)


def test_nesting_within_the_limit_is_read() -> None:
    assert read_config(b'{"a":' * 60 + b"1" + b"}" * 60, "tiny")["a"]


def test_without_a_checkpoint_the_limits_are_those_of_all_models() -> None:
    refused(config(num_hidden_layers=4097), "says num_hidden_layers 4097, but 4096 is the most", None)
    refused(config(hidden_size=1 << 25), "says hidden_size 33554432, but 16777216 is the most", None)
    read_config(config(num_hidden_layers=4096, hidden_size=1 << 20), "tiny")


def test_sizes_of_other_kinds_are_passed_over() -> None:
    check_sizes({"hidden_size": None, "num_hidden_layers": True, "vocab_size": [10**9]}, "tiny", SHAPES)


# --- code


CODE = {
    "AutoConfig": "configuration_evil.EvilConfig",
    "AutoModel": "modeling_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
}


def test_a_model_that_needs_code_of_its_own_is_refused_in_those_words() -> None:
    refused(config(model_type="evil", auto_map=CODE), "a 'evil' needs code of its own .'configuration_evil.EvilConfig'")


def test_a_model_that_transformers_knows_is_built_by_its_code_alone() -> None:
    item = read_config(config(auto_map=CODE, parts=[{"auto_map": CODE}], vision_config={"auto_map": CODE}), "tiny")
    assert "evil" not in json.dumps(item) and item["parts"] == [{}] and item["hidden_size"] == 32
    loaded = load_config({"config.json": config(auto_map=CODE)}, "tiny", SHAPES)
    assert type(loaded) is transformers.LlamaConfig and "evil" not in loaded.to_json_string()
    assert type(build_skeleton(loaded, "tiny")) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("name", ["someone/kernel", "someone/kernel@main:attention", "flash_attention_2"])
def test_kernels_that_a_config_names_are_not_fetched(key: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*arguments: Any, **named: Any) -> None:
        raise AssertionError(f"a kernel was asked for: {arguments}")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", fetch, raising=False)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch, raising=False)
    built = build_skeleton(load_config({"config.json": config(**{key: name})}, "tiny", SHAPES), "tiny")
    assert built.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("settings", [{"auto_map": CODE, "tokenizer_class": "EvilTokenizer"}, {"auto_map": CODE}])
def test_code_of_a_tokenizer_is_not_run(settings: dict[str, Any]) -> None:
    files = {"tokenizer_config.json": json.dumps(settings).encode(), "tokenizer.json": b"{}"}
    with pytest.raises(ModelError, match="the tokenizer") as caught:
        load_tokenizer({**files, "config.json": config(auto_map=CODE)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"model": {"type": "BPE"}}', b"null"])
def test_a_broken_tokenizer_is_one_line(content: bytes) -> None:
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer({"tokenizer.json": content, "config.json": config()})
    assert "\n" not in str(caught.value)
