"""A model as a file, for the tests of what a stranger may put into one."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sctconv.cli import main
from tests.models import save, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_sct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a .sct file."""
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("source") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, eos_token_id=256, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    save(transformers.LlamaForCausalLM(config), directory)
    tiny_tokenizer(directory)
    path = directory.parent / "tiny.sct"
    result = CliRunner().invoke(main, ["convert", str(directory), "-o", str(path), "--rank", "6", "--data-free"])
    assert result.exit_code == 0, result.output
    return path
