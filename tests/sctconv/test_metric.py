"""Laws of the output metric."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sctconv.convert import metric as metric_module
from sctconv.convert.budget import MemoryPlan
from sctconv.convert.decoder import Decoder
from sctconv.convert.fit import Moments, closed_form, closed_form_dual
from sctconv.convert.gradients import output_metrics
from sctconv.convert.metric import RIDGE, Metric
from sctconv.runtime.linalg import orthonormality
from sctconv.runtime.skeleton import linear_layers
from sctconv.sources import open_source
from sctconv.sources.weights import DenseModel
from tests.models import save, tiny_model, tiny_tokenizer


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _structured(m: int, r: int, seed: int = 0) -> Tensor:
    """A Fisher matrix of the kind that the metric stands for, with correlations of unit diagonal up to D."""
    Q = torch.linalg.qr(_random(m, r, seed=seed)).Q
    F = torch.eye(m, dtype=torch.float64) + Q @ torch.diag(torch.linspace(50, 5, r, dtype=torch.float64)) @ Q.T
    d = F.diagonal().rsqrt()
    return d[:, None] * F * d[None, :]


def _matrix(metric: Metric) -> Tensor:
    return metric.apply_(torch.eye(len(metric.d), dtype=torch.float64))


@pytest.mark.parametrize("size", [6, 25])
@pytest.mark.parametrize("moments", ["full", "diagonal"])
def test_apply_transpose_and_solve_belong_together(size: int, moments: str) -> None:
    g = _random(300, size) * torch.logspace(-1, 1, size, dtype=torch.float64)
    metric = Metric.of(g.T @ g if moments == "full" else g.square().sum(0))
    assert metric is not None
    C, X = _matrix(metric), _random(size, 4, seed=1)
    torch.testing.assert_close(metric.apply_(X.clone()), C @ X)
    torch.testing.assert_close(metric.apply_both_(X @ X.T), C @ X @ X.T @ C.T)
    torch.testing.assert_close(metric.apply_transposed(X), C.T @ X)
    torch.testing.assert_close(metric.solve(C @ X), X, rtol=1e-5, atol=1e-5)
    if moments == "full":
        assert orthonormality(metric.Q) < 1e-5 and metric.Q.shape[1] == size // 2
    else:
        torch.testing.assert_close(C, torch.diag(metric.d)) and metric.Q.shape[1] == 0


def test_the_leading_directions_count_as_they_do_and_the_others_alike() -> None:
    """What lies in Q has the variance of F there; the rest has the mean of what F leaves."""
    m, scale = 40, torch.logspace(-1, 1, 40, dtype=torch.float64)
    F = scale[:, None] * _structured(m, 6) * scale[None, :]
    metric = Metric.of(F.clone())
    F.diagonal().add_(RIDGE * F.diagonal().mean())
    assert metric is not None
    C, D = _matrix(metric), torch.diag(1 / metric.d)
    ours, theirs = D @ C.T @ C @ D, D @ F @ D
    values, vectors = torch.linalg.eigh(theirs)
    rho = values[: m // 2].mean()
    torch.testing.assert_close(
        (vectors.T @ ours @ vectors).diagonal()[m // 2 :], values[m // 2 :] / rho, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        (vectors.T @ ours @ vectors).diagonal()[: m // 2], torch.ones(m // 2).double(), rtol=1e-4, atol=1e-4
    )


def test_of_large_matrices_the_directions_come_from_subspace_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    F = _structured(60, 5)
    exact = Metric.of(F.clone())
    monkeypatch.setattr(metric_module, "EXACT_SIDE", 20)
    monkeypatch.setattr(metric_module, "DIRECTIONS", 5)
    quick = Metric.of(F.clone())
    assert exact is not None and quick is not None
    torch.testing.assert_close((quick.Q.T @ exact.Q[:, :5]).abs(), torch.eye(5), rtol=1e-2, atol=1e-2)


def test_no_gradient_is_no_metric() -> None:
    assert Metric.of(torch.zeros(5, 5, dtype=torch.float64)) is None
    assert Metric.of(torch.zeros(5, dtype=torch.float64)) is None


def test_an_output_that_nobody_reads_counts_little() -> None:
    g = _random(200, 8)
    g[:, 3] = 0.0
    metric = Metric.of(g.T @ g)
    assert metric is not None and float(metric.d[3]) == pytest.approx(RIDGE**0.5)
    assert torch.isfinite(_matrix(metric)).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "rank"), [(12, 9, 4), (9, 12, 3)])
def test_the_closed_forms_minimise_the_weighed_error(m: int, n: int, rank: int, bias: bool) -> None:
    """As the plain closed form does of outputs C y, of which C W' is the fit."""
    x = _random(300, n) @ _random(n, n, seed=1) + 0.3
    y = x @ _random(n, m, seed=2) + 0.5 * _random(300, m, seed=3)
    g = _random(200, m, seed=4) @ _random(m, m, seed=5)
    metric = Metric.of(g.T @ g)
    assert metric is not None
    C = _matrix(metric)

    def moments(y: Tensor) -> Moments:
        means = (x.mean(0), y.mean(0)) if bias else (None, None)
        return Moments(x.T @ x, y.T @ x, float(y.square().sum()), len(x), None, *means)

    fit, other = closed_form(moments(y), rank, metric=metric), closed_form(moments(y @ C.T), rank)
    W, CW = ((f.U.double() * f.s.double()) @ f.V.double().T for f in (fit, other))
    torch.testing.assert_close(C @ W, CW, rtol=1e-4, atol=1e-4 * float(CW.abs().max()))
    if not bias:
        prior = _random(m, n, seed=6)
        one = closed_form(moments(y), rank, metric=metric, prior=prior)
        dual = closed_form_dual(x.float(), y.float(), rank, metric=metric, prior=prior.float())
        whole, tokens = ((f.U * f.s) @ f.V.T for f in (one, dual))
        torch.testing.assert_close(tokens, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("side", [1 << 20, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_it_is_made_of_the_gradients_of_the_whole_model(family: str, side: int, tmp_path: Path) -> None:
    """Block by block equals one backward pass through transformers' own model; of many outputs only the squares."""
    source = save(tiny_model(family, vocab_size=260), tmp_path / "m")
    tiny_tokenizer(source)
    whole = tiny_model(family, vocab_size=260)
    decoder = Decoder(DenseModel(open_source(str(source))), list(linear_layers(whole)))
    batches = list((torch.arange(4 * 40).reshape(4, 40) % 256).split(2))
    found = output_metrics(decoder, batches, MemoryPlan(gram_side=side))
    name = decoder.layers[1]
    products: list[Tensor] = []
    whole.get_submodule(name).register_full_backward_hook(
        lambda module, given, gradients: products.append((g := gradients[0].flatten(0, 1).double()).T @ g)
    )
    for batch in batches:
        out = whole(input_ids=batch, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").backward()
    F = torch.stack(products).sum(0)
    expected = Metric.of(F if side > 4 else F.diagonal().clone())
    assert expected is not None
    torch.testing.assert_close(_matrix(found[name]), _matrix(expected), rtol=1e-3, atol=1e-3)
