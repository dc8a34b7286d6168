"""Training on factors: what a run promises, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import sctconv
from sctconv.cli import main
from sctconv.formats.errors import SctError
from sctconv.runtime.retraction import drift, polar_direction, retract, tangent
from sctconv.runtime.spectral import SpectralLinear
from sctconv.runtime.train import (
    Files,
    ModelTeacher,
    TrainError,
    TrainState,
    load_data,
    run,
    train,
)
from sctconv.runtime.train.optimizer import SpectralAdam
from sctconv.runtime.verify import verify
from tests.models import tiny_model
from tests.training import quick, windows


@pytest.mark.parametrize("retraction", ["qr", "polar", "householder", "absorb"])
@pytest.mark.parametrize("optimizer", ["spectral", "adamw"])
def test_it_learns_and_stays_on_the_manifold(optimizer: str, retraction: str, factored: Path) -> None:
    model, data = sctconv.load(factored).model, windows(factored)
    state = train(model, data, quick(optimizer=optimizer, retraction=retraction, steps=30))
    looks = [step.held_out for step in state.history if step.held_out is not None]
    assert state.best < looks[0] and state.step == 30 and len(state.history) == 30
    assert all(step.drift < 1e-5 for step in state.history if step.drift is not None)
    assert drift(model) < 1e-5
    assert all((layer.s > 0).all() for layer in model.modules() if isinstance(layer, SpectralLinear))


def test_the_dense_matrix_never_exists(factored: Path) -> None:
    model, data = sctconv.load(factored).model, windows(factored)
    train(model, data, quick(steps=1))
    for layer in model.modules():
        if isinstance(layer, SpectralLinear):
            assert layer.U.grad is not None and layer.U.grad.shape == layer.U.shape
            assert not hasattr(layer, "weight")


@pytest.mark.parametrize(("part", "moving"), [("factors", "U"), ("norms", "norm"), ("all", "")])
def test_only_what_is_asked_for_moves(part: str, moving: str, factored: Path) -> None:
    before, model, data = sctconv.load(factored).model, sctconv.load(factored).model, windows(factored)
    train(model, data, quick(train=part, steps=3))
    changed = {
        name
        for (name, one), other in zip(before.state_dict().items(), model.state_dict().values(), strict=True)
        if not torch.allclose(one, other, rtol=0, atol=1e-5)
    }
    assert changed and not any("embed_tokens" in name for name in changed), "embeddings are frozen unless asked for"
    if part == "factors":
        assert all(name.endswith((".U", ".s", ".V")) for name in changed)
    elif part == "norms":
        assert all("norm" in name or name.endswith("bias") for name in changed)
    assert any(moving in name for name in changed)


@pytest.mark.parametrize("optimizer", ["spectral", "adamw"])
def test_without_retraction_it_leaves_the_manifold_and_comes_back_at_the_end(optimizer: str, factored: Path) -> None:
    model, data = sctconv.load(factored).model, windows(factored)
    far: dict[str, float] = {"angle": 0.1} if optimizer == "spectral" else {}
    state = train(model, data, quick(optimizer=optimizer, retraction="none", rate=1e-2, **far))
    drifts = [step.drift for step in state.history if step.drift is not None]
    assert drifts[0] > 1e-3 and drifts[-1] < 1e-5


def test_one_loss_however_the_logits_are_split(factored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    for size in (1 << 30, 260 * 4 * 7):  # all rows at once, seven at a time
        monkeypatch.setattr("sctconv.runtime.train.objective._LOGITS_BYTES", size)
        model, data = sctconv.load(factored).model, windows(factored)
        trained.append(train(model, data, quick(steps=3, embedding_rate=1e-3)))
    for one, other in zip(trained[0].history, trained[1].history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.gradient == pytest.approx(
            other.gradient, rel=1e-4
        )


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 4}, {"checkpointing": "blocks"}])
def test_how_a_step_is_cut_does_not_change_it(changes: dict[str, Any], factored: Path) -> None:
    histories = []
    for settings in ({}, changes):
        model, data = sctconv.load(factored).model, windows(factored)
        histories.append(train(model, data, quick(steps=3, **settings)).history)
    assert [step.loss for step in histories[0]] == pytest.approx([step.loss for step in histories[1]], rel=1e-4)


def test_patience_ends_a_run_that_gets_no_better(factored: Path) -> None:
    model, data = sctconv.load(factored).model, windows(factored)
    state = train(model, data, quick(steps=40, eval_every=1, patience=3, angle=1.5, singular_rate=1.0, rate=0.5))
    assert state.step == state.best_step + 3 < 40


def test_documents_are_masked_where_that_is_asked_for(factored: Path, tmp_path: Path) -> None:
    tokenizer = sctconv.load(factored).tokenizer
    lines = [json.dumps({"text": f"Number {place}."}) for place in range(200)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    data = load_data([str(tmp_path / "r.jsonl")], tokenizer, context=32, held_out=0.1, document_masks=True)
    batch = data.training
    assert batch.positions is not None and bool((batch.positions[:, 0] == 0).all())
    ends = batch.windows == tokenizer.eos_token_id
    assert torch.equal(batch.positions[:, 1:] == 0, ends[:, :-1]), "places begin again after each end"
    model = sctconv.load(factored).model
    state = train(model, data, quick(steps=8, document_masks=True))
    assert state.best < (state.history[0].loss or 0)


def test_a_tokenizer_of_another_model_is_named(factored: Path) -> None:
    with pytest.raises(TrainError, match="the tokenizer makes token 220, but the model's vocabulary is 90"):
        windows(factored, vocabulary=90)


def test_answers_are_needed(factored: Path, tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "Anybody there? " * 9}]}
    (tmp_path / "r.jsonl").write_text("\n".join([json.dumps(record)] * 20))
    with pytest.raises(TrainError, match="no token to train on is an answer"):
        load_data([str(tmp_path / "r.jsonl")], sctconv.load(factored).tokenizer, context=32, held_out=0.1)


def test_a_teacher_is_followed(factored: Path) -> None:
    teacher = tiny_model("llama", vocab_size=260)
    model, data = sctconv.load(factored).model, windows(factored)

    def kl() -> float:
        with torch.no_grad():
            logs = [torch.log_softmax(each(input_ids=data.held_out.windows).logits, -1) for each in (model, teacher)]
        return float(torch.nn.functional.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean"))

    before = kl()
    train(model, data, quick(teacher_weight=1.0, steps=30), teacher=ModelTeacher(teacher))
    assert kl() < 0.8 * before
    with pytest.raises(TrainError, match="the teacher has a vocabulary of 128, the model one of 260"):
        train(model, data, quick(), teacher=ModelTeacher(tiny_model("llama", vocab_size=128)))


def test_a_loss_that_is_not_finite_stops_the_run(factored: Path) -> None:
    model, data = sctconv.load(factored).model, windows(factored)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(TrainError, match="step 1: the loss is nan"):
        train(model, data, quick())


@pytest.mark.parametrize("polar", [None, polar_direction])
def test_a_step_turns_each_column_by_its_angle(polar: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.nn.Parameter(torch.linalg.qr(torch.randn(400, 6, generator=generator))[0])
    before = X.detach().clone()
    optimizer = SpectralAdam(
        [{"params": [X], "kind": "stiefel", "rate": 0.01}], tangent=tangent, retract=retract, polar=polar
    )
    X.grad = torch.randn(400, 6, generator=generator)
    X.grad[:, 1] += 3 * X.grad[:, 0]
    optimizer.step()
    angles = torch.acos((before * X.detach()).sum(0).double().clamp(-1, 1))
    torch.testing.assert_close(angles, torch.full((6,), 0.01, dtype=torch.float64), rtol=0.05, atol=0)
    if polar is not None:  # and every direction in their span as well
        moved = torch.linalg.svdvals((X.detach() - before).double())
        torch.testing.assert_close(moved, torch.full((6,), 0.01, dtype=torch.float64), rtol=0.05, atol=0)


def test_singular_values_move_by_a_share_of_themselves() -> None:
    s = torch.nn.Parameter(torch.tensor([100.0, 1.0, 0.01]))
    optimizer = SpectralAdam([{"params": [s], "kind": "singular", "rate": 0.01}], tangent=tangent, retract=None)
    s.grad = torch.tensor([1.0, -1.0, 1.0])
    optimizer.step()
    torch.testing.assert_close(
        s.detach(), torch.tensor([100.0, 1.0, 0.01]) * torch.exp(torch.tensor([-0.01, 0.01, -0.01]))
    )
    with pytest.raises(ValueError, match="kind 'sphere'"):
        SpectralAdam([{"params": [s], "kind": "sphere"}], tangent=tangent, retract=None)


def test_gradients_are_finite_differences() -> None:
    layer = SpectralLinear(5, 4, 2).double()
    layer.s.data = layer.s.data.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_records_and_what_of_them_is_learned(factored: Path, tmp_path: Path) -> None:
    tokenizer = sctconv.load(factored).tokenizer
    lines: list[dict[str, Any]] = [
        {"prompt": "How many?", "completion": " Seven."},
        {"text": "Plain words."},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(line) for line in lines * 20))
    data = load_data([str(tmp_path / "r.jsonl")], tokenizer, context=64, held_out=0.1)
    first = data.training
    learned = tokenizer.decode(first.windows[0][first.learned[0]])
    assert "How many?" not in learned and " Seven." in learned and "Plain words." in learned
    assert "Ho" in learned and "Hi" not in learned and "user:" not in learned
    assert data.sources[0][0] == "r.jsonl"


def test_batches_are_decided_by_seed_and_step(factored: Path) -> None:
    data = windows(factored)
    one, other = data.batch(3, 4, seed=0), data.batch(3, 4, seed=0)
    assert torch.equal(one.windows, other.windows) and one.places != data.batch(3, 4, seed=1).places
    assert torch.equal(one.windows, data.training.windows[list(one.places)])
    count = len(data.training.places)
    epoch = [place for step in range(count) for place in data.batch(step, 1, 0).places]
    assert sorted(epoch) == list(range(count)), "each window once an epoch"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("short", "less than two windows of 32"),
        ("", "an empty text"),
        ('{"nothing": 1}\n', "record 1 has neither text, nor prompt and completion, nor messages"),
        ('{"messages": [{"content": "no role"}]}\n', "record 1: message 1 is no object with role and content"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}\n',
            "record 1: message 2 is no object with",
        ),
        ('{"messages": ["a"]}\n', "record 1: message 1 is no object with role and content"),
        ('{"messages": "a"}\n', "record 1: messages is no list of objects with role and content"),
        ("not json\n", "line 1 is not a JSON object"),
    ],
)
def test_texts_that_cannot_be_used(content: str, message: str, factored: Path, tmp_path: Path) -> None:
    path = tmp_path / ("t.jsonl" if content.endswith("\n") else "t.txt")
    path.write_text(content)
    with pytest.raises(SctError, match=message):
        load_data([str(path)], sctconv.load(factored).tokenizer, context=32, held_out=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"batch": 3}, "--batch 3: not a multiple of --micro-batch 2"),
        ({"rate": -1.0}, "--rate -1.0"),
        ({"angle": float("nan")}, "--angle nan"),
        ({"schedule": "linear"}, "--schedule linear: choose one of cosine"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"train": "heads"}, "--train heads: choose one of all"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        quick(**changes)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules(schedule: str) -> None:
    options = quick(steps=100, schedule=schedule, warm_up=0.1)
    factors = [options.factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and max(factors) == 1.0
    assert factors[-1] < 0.06 if schedule != "constant" else factors[-1] == 1.0
    assert all(0.0 <= factor <= 1.0 for factor in factors)


def test_best_is_told_when_it_is_reached(factored: Path) -> None:
    model, data = sctconv.load(factored).model, windows(factored)
    told: list[tuple[int, float]] = []

    def best(state: TrainState) -> None:
        told.append((state.step, state.best))

    state = train(model, data, quick(steps=12), on_best=best)
    assert told[0][0] == 0 and told[-1] == (state.best_step, state.best)
    assert [loss for _, loss in told] == sorted((loss for _, loss in told), reverse=True)


def test_the_command_line(factored: Path, tmp_path: Path) -> None:
    text, out = str(factored.parent / "text.txt"), tmp_path / "new.sct"
    args = ["train", str(factored), "--data", text, "-o", str(out), "--context", "32", "--eval-every", "4"]
    args += ["--angle", "0.02", "--singular-rate", "0.01"]
    result = CliRunner().invoke(main, [*args, "--steps", "8", "--save-every", "4", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["perplexity"] < summary["perplexity_before"] and summary["steps"] == 8
    lines = [json.loads(line) for line in (tmp_path / "new.metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[3]["held_out"] is not None
    verify(out)
    page = (tmp_path / "new.train.html").read_text()
    assert all(word in page for word in ("held-out", "Drift", "Spectra", "gate_proj")) and "<script" not in page
    assert ">training<" in page and ">var(" not in page, "the legend has words, not colours"
    assert sctconv.load(tmp_path / "new.checkpoint.sct").model is not None, "a checkpoint is a model"
    again = CliRunner().invoke(main, [*args, "--steps", "8"])
    assert again.exit_code == 1 and "exists already" in again.stderr and len(again.stderr.splitlines()) == 1
    other = CliRunner().invoke(main, [*args, "--steps", "9", "--resume", str(tmp_path / "new.checkpoint.sct")])
    assert other.exit_code == 1 and "was made with steps 8, not 9" in other.stderr


@pytest.mark.parametrize("angle", [0.01, 1.5])
def test_the_file_is_the_best_of_what_was_looked_at(angle: float, factored: Path, tmp_path: Path) -> None:
    """Also where the rates are absurd and the run jumps about."""
    files = Files(factored, tmp_path / "new.sct")
    options = quick(steps=6, angle=angle, singular_rate=angle, rate=angle / 10, eval_every=1, clip=0.0)
    summary = run(files, [str(factored.parent / "text.txt")], options)
    lines = [json.loads(line)["held_out"] for line in files.metrics.read_text().splitlines()]
    assert math.log(summary["perplexity"]) == pytest.approx(min([*lines, math.log(summary["perplexity_before"])]))
    data = windows(factored)
    with torch.no_grad():
        logits = sctconv.load(files.output).model(input_ids=data.held_out.windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.held_out.windows[:, 1:].flatten())
    assert math.exp(float(loss)) == pytest.approx(summary["perplexity"], rel=1e-4)
