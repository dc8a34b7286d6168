"""Distillation: a teacher beside the student, and one that was asked beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

import sctconv
from sctconv.cli import main
from sctconv.formats.errors import FormatError
from sctconv.runtime.train import CachedTeacher, ModelTeacher, TrainData, TrainError, train, write_cache
from sctconv.runtime.train.teacher import Taught, cache_facts, divergence
from tests.models import tiny_model
from tests.training import quick, windows

TEMPERATURES = [0.5, 1.0, 2.0]


def _teacher() -> Any:
    return tiny_model("llama", vocab_size=260)


def _cache(data: TrainData, path: Path, top: int, temperature: float = 1.0) -> CachedTeacher:
    facts = cache_facts(data, "t", temperature, top)
    write_cache(_teacher(), data, path, facts, bf16=False)
    return CachedTeacher(path, facts)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_divergence_is_kl_and_with_all_successors_the_same(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = (3 * torch.randn(7, 50, generator=generator) for _ in range(2))
    q, p = (torch.softmax(logits.double() / temperature, -1) for logits in (own, other))
    expected = float((p * (p.log() - q.log())).sum()) * temperature**2
    logs = F.log_softmax(other / temperature, -1)
    assert float(divergence(own, Taught(logs), temperature)) == pytest.approx(expected, rel=1e-5)
    most, ids = logs.topk(50)
    assert float(divergence(own, Taught(most, ids), temperature)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("top", [1, 5, 20, 49])
def test_fewer_successors_give_a_lower_bound_that_is_nothing_only_for_the_teacher_itself(top: int) -> None:
    generator = torch.Generator().manual_seed(top)
    own, other = (3 * torch.randn(7, 50, generator=generator) for _ in range(2))
    logs = F.log_softmax(other, -1)
    most, ids = logs.topk(top)
    whole = float(divergence(own, Taught(logs), 1.0))
    part = float(divergence(own, Taught(most, ids), 1.0))
    assert 0.0 < part < whole
    assert abs(float(divergence(other, Taught(most, ids), 1.0))) < 1e-4


def test_a_cache_teaches_what_its_teacher_does(factored: Path, tmp_path: Path) -> None:
    data, losses = windows(factored), []
    for teacher in (ModelTeacher(_teacher(), bf16=False), _cache(data, tmp_path / "c.sct", 260)):
        model = sctconv.load(factored).model
        losses.append([step.loss for step in train(model, data, quick(teacher_weight=1.0), teacher=teacher).history])
    assert losses[0] == pytest.approx(losses[1], abs=5e-4)  # logarithms of about -6 are kept to 2 in 1000


def test_a_short_cache_teaches_nearly_as_well(factored: Path, tmp_path: Path) -> None:
    data = windows(factored)
    batch = data.held_out

    def kl(model: Any) -> float:
        with torch.no_grad():
            logs = [torch.log_softmax(each(input_ids=batch.windows).logits, -1) for each in (model, _teacher())]
        return float(F.kl_div(logs[0], logs[1], log_target=True, reduction="batchmean"))

    model = sctconv.load(factored).model
    before = kl(model)
    train(model, data, quick(teacher_weight=1.0, steps=30), teacher=_cache(data, tmp_path / "c.sct", 40))
    assert kl(model) < 0.85 * before


def test_a_cache_of_something_else_is_refused(factored: Path, tmp_path: Path) -> None:
    data, path = windows(factored), tmp_path / "c.sct"
    _cache(data, path, 8)
    for changes, words in (
        ({"temperature": 2.0}, "temperature 1.0, not 2.0"),
        ({"top": 9}, "top 8, not 9"),
        ({"teacher": "u"}, "teacher t, not u"),
        ({"data": "other"}, "data .*, not other"),
    ):
        with pytest.raises(TrainError, match=f"c.sct: was made with {words}"):
            CachedTeacher(path, {**cache_facts(data, "t", 1.0, 8), **changes})
    with pytest.raises(TrainError, match="no teacher's cache"):
        CachedTeacher(factored, {})
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FormatError):
        CachedTeacher(path, cache_facts(data, "t", 1.0, 8))


def test_from_the_command_line_the_teacher_is_loaded_once(factored: Path, tmp_path: Path) -> None:
    args = ["train", str(factored), "--data", str(factored.parent / "text.txt"), "--context", "32", "--steps", "4"]
    args += ["--teacher-cache", str(tmp_path / "c.sct"), "--teacher-top", "8", "--json"]
    teacher = factored.parent / "m"
    first = CliRunner().invoke(main, [*args, "--teacher", str(teacher), "-o", str(tmp_path / "a.sct")])
    assert first.exit_code == 0, first.output
    moved = teacher.rename(factored.parent / "away")
    try:
        (tmp_path / "m").mkdir()  # of the same name, but no model: it must not be read
        again = CliRunner().invoke(main, [*args, "--teacher", str(tmp_path / "m"), "-o", str(tmp_path / "b.sct")])
    finally:
        moved.rename(teacher)
    assert again.exit_code == 0, again.output
    assert json.loads(first.stdout)["perplexity"] == json.loads(again.stdout)["perplexity"]
    alone = CliRunner().invoke(main, [*args, "-o", str(tmp_path / "d.sct")])
    assert alone.exit_code == 2 and "--teacher-cache" in alone.stderr and "give --teacher SRC too" in alone.stderr
