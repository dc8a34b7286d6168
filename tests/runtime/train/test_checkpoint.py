"""What a run writes: a model, or all that it needs to go on exactly where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sctconv
from sctconv import SctFile
from sctconv.formats.writer import SctWriter
from sctconv.runtime.spectral import SpectralLayer
from sctconv.runtime.train import (
    TrainError,
    TrainState,
    load_weights,
    restore,
    save_checkpoint,
    save_model,
    start,
    train,
)
from sctconv.runtime.verify import verify
from tests.training import quick, windows

FACTS = {"data": "ab", "teacher": None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw"},
        {"momentum": "int8"},
        {"weights": "bfloat16", "bf16": True, "checkpointing": "factors", "step_in_backward": True},
    ],
    ids=str,
)
def test_a_run_stopped_and_resumed_is_the_uninterrupted_one_bit_for_bit(
    changes: dict[str, Any], factored: Path, tmp_path: Path
) -> None:
    data, options = windows(factored), quick(**changes)
    whole = load_weights(factored, options.weights)
    train(whole, data, options)

    class StopError(Exception):
        pass

    first = load_weights(factored, options.weights)
    state = start(first, options)

    def stop(progress: Any) -> None:
        if progress.step == 7:
            raise StopError

    with SctFile(factored) as source:
        with pytest.raises(StopError):
            train(first, data, options, state=state, on_step=stop)
        save_checkpoint(first, source, state, options, FACTS, tmp_path / "c.sct")
    assert not any(parameter._post_accumulate_grad_hooks for parameter in first.parameters())
    second = load_weights(tmp_path / "c.sct", options.weights)
    state = restore(second, start(second, options), options, FACTS, tmp_path / "c.sct")
    assert state.step == 7
    train(second, data, options, state=state)
    for (name, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_is_a_valid_file_however_the_singular_values_stand(factored: Path, tmp_path: Path) -> None:
    model, data, options = sctconv.load(factored).model, windows(factored), quick(steps=2, optimizer="adamw")
    state = train(model, data, options)
    generator = torch.Generator().manual_seed(0)
    layers = [layer for layer in model.modules() if isinstance(layer, SpectralLayer)]
    for layer in layers:
        layer.s.data = torch.randn(layer.s.shape, generator=generator)
    with SctFile(factored) as source:
        save_checkpoint(model, source, state, options, FACTS, tmp_path / "c.sct")
    verify(tmp_path / "c.sct")
    ids = data.held_out.windows[:1]
    loaded = sctconv.load(tmp_path / "c.sct").model
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    restore(loaded, start(loaded, options), options, FACTS, tmp_path / "c.sct")
    for (name, one), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("optimizer", ["spectral", "adamw"])
def test_what_had_no_gradient_in_some_steps_goes_on_with_its_own_count(
    optimizer: str, factored: Path, tmp_path: Path
) -> None:
    def moved(model: Any, state: TrainState, steps: range) -> None:
        for step in steps:
            for place, parameter in enumerate(model.parameters()):
                parameter.grad = None if place % 4 > step else torch.full_like(parameter, 0.1 * step + 0.1)
            for group in state.optimizer.param_groups:
                group["rate" if "rate" in group else "lr"] = group["full_rate"]
            state.optimizer.step()
            state.step += 1

    options = quick(optimizer=optimizer)
    whole = sctconv.load(factored).model
    first = start(whole, options)
    first.best = 1.0
    with SctFile(factored) as source:
        moved(whole, first, range(2))  # some parameters twice, some once, some never
        save_checkpoint(whole, source, first, options, FACTS, tmp_path / "c.sct")
    resumed = load_weights(tmp_path / "c.sct", "float32")
    second = restore(resumed, start(resumed, options), options, FACTS, tmp_path / "c.sct")
    moved(whole, first, range(2, 5))
    moved(resumed, second, range(2, 5))
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_another_run_is_not_resumed(factored: Path, tmp_path: Path) -> None:
    model, data, options = sctconv.load(factored).model, windows(factored), quick(steps=2)
    state = train(model, data, options)
    with SctFile(factored) as source:
        save_checkpoint(model, source, state, options, FACTS, tmp_path / "c.sct")
        save_model(model, source, tmp_path / "m.sct", training={})
    fresh = start(model, options)
    with pytest.raises(TrainError, match=r"c.sct: was made with seed 0, not 1"):
        restore(model, fresh, quick(steps=2, seed=1), FACTS, tmp_path / "c.sct")
    for name, value in {"data": "cd", "teacher": "large"}.items():
        with pytest.raises(TrainError, match=f"was made with {name} {FACTS[name]}, not {value}"):
            restore(model, fresh, options, {**FACTS, name: value}, tmp_path / "c.sct")
    with pytest.raises(TrainError, match="a model, not a checkpoint"):
        restore(model, fresh, options, FACTS, tmp_path / "m.sct")


def _rewritten(path: Path, training: dict[str, Any], **tensors: np.ndarray) -> Path:
    """The checkpoint with other words of its run, or other tensors."""
    with SctFile(path) as file:
        metadata = file.index.metadata | {"training": file.index.metadata["training"] | training}
        with SctWriter(path.with_name("rewritten.sct"), overwrite=True, metadata=metadata) as out:
            for name in file.index.tensors:
                out.add_tensor(name, tensors.get(name, file.tensor(name)))
            out.commit()
    return path.with_name("rewritten.sct")


def test_a_damaged_checkpoint_is_named(factored: Path, tmp_path: Path) -> None:
    """Whoever wrote it: each is one line, and nothing of it reaches a run."""
    model, data, options = sctconv.load(factored).model, windows(factored), quick(steps=2)
    state = train(model, data, options)
    path = tmp_path / "c.sct"
    with SctFile(factored) as source:
        save_checkpoint(model, source, state, options, FACTS, path)
    damage: dict[str, list[Any]] = {
        "options": [None, [1], "x"],
        "facts": [None, 3],
        "step": [None, "2", -1, 2.5, True, 3],
        "best": [None, "low", [1.0]],
        "best_step": [-2, {}],
        "looks": ["1", -1],
        "counts": [[1], {"lm_head.weight": "two"}, {"lm_head.weight": -1}],
    }
    for name, values in damage.items():
        for value in values:
            with pytest.raises(TrainError, match=rf"rewritten.sct: what it says of its run is damaged \({name}"):
                restore(model, start(model, options), options, FACTS, _rewritten(path, {name: value}))
    with pytest.raises(TrainError, match=r"damaged \(step 2 of 2, the best 3\)"):
        restore(model, start(model, options), options, FACTS, _rewritten(path, {"best_step": 3}))
    with SctFile(path) as file:
        order = next(name for name in file.index.tensors if name.startswith("optimizer.order."))
        moment = next(name for name in file.index.tensors if name.startswith("optimizer.first."))
        places, weight = file.tensor(order), moment.removeprefix("optimizer.first.")
        small = file.tensor(moment)[:-1]
    for bad in (np.ones_like(places), places * 2, places - 1, places.astype(np.float32)):
        with pytest.raises(TrainError, match=r"damaged \(the order of .*'s columns\)"):
            restore(model, start(model, options), options, FACTS, _rewritten(path, {}, **{order: bad}))
    for name in (moment, weight):
        with pytest.raises(TrainError, match=rf"{name} is .*; resume it with the model it began with"):
            restore(model, start(model, options), options, FACTS, _rewritten(path, {}, **{name: small}))


def test_what_was_trained_is_what_is_saved(factored: Path, tmp_path: Path) -> None:
    model, data = sctconv.load(factored).model, windows(factored)
    train(model, data, quick())
    ids = data.held_out.windows[:1]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with SctFile(factored) as source:
            save_model(model, source, tmp_path / "n.sct", training={"steps": 12})
        after = sctconv.load(tmp_path / "n.sct").model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    verify(tmp_path / "n.sct")
    with SctFile(tmp_path / "n.sct") as file:
        assert file.index.metadata["training"] == {"steps": 12}
        assert all(record.energy is None and record.error is None for record in file.index.layers.values())
