"""What a run will need, said before it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

import sctconv
from sctconv.cli import main
from sctconv.convert.scratch import initialise
from sctconv.runtime.precision import products
from sctconv.runtime.train import TrainError, TrainOptions, estimate, fitted, load_weights, start
from sctconv.runtime.train.reversal import is_reversible
from tests.training import quick

SETTINGS: list[dict[str, Any]] = [
    {},
    {"micro_batch": 4},
    {"optimizer": "adamw"},
    {"momentum": "bfloat16"},
    {"momentum": "int8"},
    {"weights": "bfloat16", "bf16": True},
    {"train": "factors"},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_weights_moments_and_activations_are_what_a_run_holds(changes: dict[str, Any], factored: Path) -> None:
    options = quick(**changes).resolved(torch.device("cpu"))
    parts = estimate(factored, options)
    assert parts["peak"] == sum(nbytes for name, nbytes in parts.items() if name != "peak")
    model = load_weights(factored, options.weights)
    optimizer = start(model, options).optimizer
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    assert parts["weights"] == sum(weights.values())
    ids = torch.zeros(options.micro_batch, options.context, dtype=torch.long)
    if options.optimizer == "spectral":
        for name, keys in {
            "first moments": ("first", "first_scale"),
            "second moments": ("second_rows", "second"),
        }.items():
            held = sum(state[key].nbytes for state in optimizer.state.values() for key in keys if key in state)
            assert parts[name] == pytest.approx(held, rel=0.1), "scales of a block that is not full count whole"
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    cut = products(ids.device, bool(options.bf16))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cut:
        output = model.base_model(input_ids=ids, use_cache=False)
    assert parts["activations"] == pytest.approx(sum(kept.values()), rel=0.15)
    del output


def test_each_lever_needs_less(factored: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4
    )
    config.architectures = ["LlamaForCausalLM"]
    initialise({"config.json": config.to_json_string().encode()}, tmp_path / "deep.sct", rank=6)
    base: dict[str, Any] = {"batch": 4, "micro_batch": 4}
    levers: dict[str, dict[str, Any]] = {
        "activations": {"checkpointing": "blocks"},
        "gradients": {"step_in_backward": True},
        "first moments": {"momentum": "int8"},
        "weights": {"weights": "bfloat16", "bf16": True},
    }
    plain = estimate(tmp_path / "deep.sct", quick(**base))
    for part, changes in levers.items():
        assert estimate(tmp_path / "deep.sct", quick(**base, **changes))[part] < 0.7 * plain[part], part
    blocks, factors = (
        estimate(tmp_path / "deep.sct", quick(**base, checkpointing=kind))["activations"]
        for kind in ("blocks", "factors")
    )
    assert factors < blocks


def test_as_few_levers_as_suffice(factored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sctconv.runtime.train.plan.rss_bytes", lambda: 0)
    options = quick(batch=4, micro_batch=2)
    assert is_reversible(sctconv.load(factored).model)
    needed = estimate(factored, options)["peak"]
    assert fitted(factored, options, 2 * needed, "cpu") == options
    first = replace(options, checkpointing="factors")
    assert fitted(factored, options, needed - 1, "cpu") == first
    fewer = fitted(factored, options, estimate(factored, first)["peak"] - 1, "cpu")
    assert fewer.micro_batch == 1 or fewer.step_in_backward
    assert fewer.momentum == fewer.weights == "float32"
    with pytest.raises(TrainError, match=r"GiB are the least that m\.sct trains in .* shorter --context"):
        fitted(factored, options, 1 << 10, "cpu")


def test_the_command_prints_the_plan_and_writes_nothing(factored: Path, tmp_path: Path) -> None:
    args = [
        "train",
        str(factored),
        "--data",
        str(factored.parent / "text.txt"),
        "-o",
        str(tmp_path / "n.sct"),
        "--plan",
    ]
    result = CliRunner().invoke(main, [*args, "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == set(estimate(factored, TrainOptions()))
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and "activations" in result.stdout and not list(tmp_path.iterdir())
    wrong = CliRunner().invoke(main, [*args, "--max-memory", "1MiB"])
    assert wrong.exit_code == 1 and len(wrong.stderr.splitlines()) == 1 and "are the least" in wrong.stderr
