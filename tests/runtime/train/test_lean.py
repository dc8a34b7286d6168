"""Training in less memory: the same steps, or nearly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sctconv
from sctconv.convert import ConvertOptions, convert
from sctconv.runtime.retraction import drift, retract, tangent
from sctconv.runtime.train import TrainError, load_weights, train
from sctconv.runtime.train.moments import MOMENTA, begin_, get, put_, rounded
from sctconv.runtime.train.optimizer import SpectralAdam
from sctconv.runtime.train.reversal import is_reversible, reversing
from tests.models import save, tiny_model, tiny_tokenizer
from tests.training import TEXT, quick, windows

LOSSLESS: dict[str, dict[str, Any]] = {
    "step in backward": {"step_in_backward": True},
    "step in backward, in parts": {"step_in_backward": True, "micro_batch": 1},
    "blocks": {"checkpointing": "blocks"},
    "factors": {"checkpointing": "factors"},
    "both": {"checkpointing": "factors", "step_in_backward": True},
}
LOSSY: dict[str, dict[str, Any]] = {
    "bfloat16 momentum": {"momentum": "bfloat16"},
    "int8 momentum": {"momentum": "int8"},
    "bfloat16 weights": {"weights": "bfloat16", "bf16": True},
    "all": {
        "momentum": "int8",
        "weights": "bfloat16",
        "bf16": True,
        "checkpointing": "factors",
        "step_in_backward": True,
    },
}


def _run(factored: Path, **changes: Any) -> tuple[Any, Any]:
    model, data = load_weights(factored, changes.get("weights", "float32")), windows(factored)
    return model, train(model, data, quick(**{"steps": 20, "clip": 0.05, "embedding_rate": 1e-3, **changes}))


@pytest.mark.parametrize("lever", sorted(LOSSLESS))
def test_a_lossless_lever_takes_the_same_steps(lever: str, factored: Path) -> None:
    plain, lean = _run(factored), _run(factored, **LOSSLESS[lever])
    assert [step.loss for step in lean[1].history] == pytest.approx([step.loss for step in plain[1].history], rel=2e-5)
    norms = [[step.gradient for step in state.history] for _, state in (plain, lean)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and min(norms[0]) > 0.05, "they are clipped too"
    for (name, one), other in zip(plain[0].state_dict().items(), lean[0].state_dict().values(), strict=True):
        assert (one - other).abs().max() < 1e-4 * one.abs().max(), name
    if LOSSLESS[lever].get("step_in_backward"):
        ends = {"model.embed_tokens", "lm_head"}
        for name, parameter in lean[0].named_parameters():
            if name.rpartition(".")[0] not in ends:
                assert parameter.grad is None, name


@pytest.mark.parametrize("lever", sorted(LOSSY))
def test_a_lossy_lever_comes_as_far(lever: str, factored: Path) -> None:
    plain, lean = _run(factored)[1], _run(factored, **LOSSY[lever])
    begin, end = plain.history[0].loss, plain.best
    assert lean[1].best < end + 0.05 * (begin - end), (begin, end, lean[1].best)
    assert drift(lean[0]) < (5e-3 if "weights" in LOSSY[lever] else 1e-5)


def test_all_gradients_together_are_no_longer_than_they_may_be() -> None:
    """Whatever their lengths; short ones stay as they are."""
    generator = torch.Generator().manual_seed(0)
    kinds = {"stiefel": (64, 4), "singular": (4,), "plain": (16, 3)}
    groups = [
        {"params": [nn.Parameter(torch.rand(shape, generator=generator)) for _ in range(4)], "kind": kind, "rate": 1e-3}
        for kind, shape in kinds.items()
    ]
    optimizer = SpectralAdam(groups, tangent=lambda _, G: G, retract=None, clip=1.0)
    parameters = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    short = parameters[0]
    for parameter in parameters:
        length = 0.1 if parameter is short else float(10.0 ** torch.randint(0, 6, (), generator=generator))
        direction = torch.randn(parameter.shape, generator=generator)
        parameter.grad = length * direction / direction.norm() / (parameter.detach() if parameter.ndim == 1 else 1.0)
    given = short.grad.clone()
    optimizer.step()
    taken = {parameter: optimizer.state[parameter]["first"] / 0.1 for parameter in parameters}
    torch.testing.assert_close(taken[short], given)
    lengths = torch.stack([first.norm() for parameter, first in taken.items() if parameter.ndim > 1])
    assert lengths.square().sum() <= 1.0 + 1e-5 and lengths.max() < 12**-0.5 + 1e-5


def test_factors_alone_are_kept_between_the_passes(factored: Path) -> None:
    model = sctconv.load(factored).model
    ids = torch.arange(2 * 24).reshape(2, 24)
    with reversing(model):
        kept: list[torch.Size] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            state = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        inside = [shape for shape in kept if shape[-1] == 6]
        assert len(inside) == 2 * model.config.num_hidden_layers
        assert sum(math.prod(shape) for shape in kept if shape[:2] == (2, 24) and shape[-1] != 6) <= 6 * state.numel()
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_blocks_that_are_no_such_sum_are_named(tmp_path: Path) -> None:
    source = save(tiny_model("gemma3", vocab_size=260), tmp_path / "m")  # norms after attention and MLP
    tiny_tokenizer(source)
    (tmp_path / "text.txt").write_text(TEXT)
    convert(str(source), tmp_path / "m.sct", ConvertOptions(rank=6, modules="all"))
    model, data = sctconv.load(tmp_path / "m.sct").model, windows(tmp_path / "m.sct")
    assert not is_reversible(model)
    for bf16 in (False, True):
        with pytest.raises(TrainError, match=r"block 0 does not add .* use --checkpointing blocks"):
            train(
                model, data, quick(checkpointing="factors", bf16=bf16), on_best=lambda _: pytest.fail("written already")
            )


@pytest.mark.parametrize("shape", [(7,), (256, 3), (1000, 5), (1, 1)])
@pytest.mark.parametrize("kind", MOMENTA)
def test_a_moment_is_kept_to_its_precision(kind: str, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    state: dict[str, Any] = {}
    begin_(state, "first", torch.empty(shape), kind)
    assert torch.equal(get(state, "first"), torch.zeros(shape))
    put_(state, "first", value)
    share = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.5 / 127}[kind]
    assert (get(state, "first") - value).abs().max() <= 1.001 * share * value.abs().max()
    if kind == "int8" and len(shape) == 2 and shape[0] > 256:
        assert state["first_scale"].shape == (4, shape[1])


def test_rounding_at_random_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2000, generator=generator)
    many = torch.stack([rounded(value, generator).float() for _ in range(400)])
    assert (many - value).abs().max() <= 2.0**-7 * value.abs().max()
    error = (many.mean(0) - value) / (value.abs() * 2.0**-8)
    assert error.abs().mean() < 0.05 and abs(float(error.mean())) < 5e-3
    exact = torch.tensor([0.0, 1.0, -1.5, 2.0**20])
    assert torch.equal(rounded(exact, generator).float(), exact)


def test_a_step_smaller_than_bfloat16_can_say_is_not_lost() -> None:
    moved = []
    for _ in range(2):
        parameter = nn.Parameter(torch.ones(4096, 2, dtype=torch.bfloat16))
        optimizer = SpectralAdam(
            [{"params": [parameter], "kind": "plain", "rate": 1e-4}], tangent=lambda X, G: G, retract=None
        )
        for _ in range(20):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved.append(parameter.detach().float())
    assert float(moved[0].mean()) == pytest.approx(1.0 - 20 * 1e-4, abs=3e-4)
    assert torch.equal(*moved), "the same command gives the same bytes"


@pytest.mark.parametrize("kind", ["plain", "stiefel"])
@pytest.mark.parametrize("momentum", ["float32", "int8"])
def test_what_rounding_takes_is_given_back(kind: str, momentum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from where float32 would be after the same gradients: a few roundings, not the sum of all of them."""

    def after(dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        X = torch.linalg.qr(torch.randn(2048, 4, generator=generator))[0].contiguous()
        parameter = nn.Parameter(X.to(dtype))
        group = {"params": [parameter], "kind": kind, "rate": {"plain": 2e-5, "stiefel": 1e-3}[kind]}
        optimizer = SpectralAdam([group], tangent=tangent, retract=retract, momentum=momentum)
        for _ in range(400):
            parameter.grad = torch.randn(X.shape, generator=generator).to(dtype)
            optimizer.step()
        return parameter.detach().float()

    exact = after(torch.float32)
    distance = float((after(torch.bfloat16) - exact).norm())
    monkeypatch.setattr("sctconv.runtime.train.optimizer._owe_", lambda *_: None)
    assert distance < 0.5 * float((after(torch.bfloat16) - exact).norm())


def test_weights_that_are_not_what_the_options_say_are_refused(factored: Path) -> None:
    data = windows(factored)
    for given, said in (("float32", "bfloat16"), ("bfloat16", "float32")):
        with pytest.raises(TrainError, match=f"--weights {said}: .* {given}; load it with load_weights"):
            train(load_weights(factored, given), data, quick(weights=said, bf16=said == "bfloat16"))


@pytest.mark.parametrize("kind", ["plain", "stiefel"])
def test_small_gradients_keep_a_momentum_in_8_bits(kind: str) -> None:
    """Adam steps as far for their entries, or rows of a factor, as for the rest of a block."""
    moved = []
    scales = torch.logspace(0, -6 if kind == "plain" else -3, 256)[:, None]
    for momentum in ("float32", "int8"):
        generator = torch.Generator().manual_seed(0)
        begin = torch.linalg.qr(torch.randn(256, 2, generator=generator))[0].contiguous()
        parameter = nn.Parameter(begin.clone())
        group = {"params": [parameter], "kind": kind, "rate": 1e-3}
        optimizer = SpectralAdam([group], tangent=lambda _, G: G, retract=None, momentum=momentum)
        for _ in range(50):
            parameter.grad = scales * (1.0 + torch.randn(256, 2, generator=generator))
            optimizer.step()
        moved.append(parameter.detach() - begin)
    least = {"plain": 5e-3, "stiefel": 2e-3}[kind]
    assert moved[0].max() < 0.0 and moved[0].norm(dim=1).min() > least, "all go down their gradient"
    assert (moved[1] - moved[0]).norm(dim=1).max() < 0.05 * moved[0].norm(dim=1).min()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"momentum": "int8", "optimizer": "adamw"}, "--momentum: needs --optimizer spectral"),
        ({"weights": "bfloat16", "optimizer": "adamw", "bf16": True}, "--weights: needs --optimizer spectral"),
        ({"momentum": "float64"}, "--momentum float64: choose one of float32, bfloat16, int8"),
        ({"weights": "bfloat16", "bf16": False}, "--weights bfloat16: .* leave out --no-bf16"),
        ({"checkpointing": "some"}, "--checkpointing some: choose one of none, blocks, factors"),
    ],
)
def test_options_that_do_not_go_together_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(TrainError, match=line):
        quick(**settings)
