"""Optimisers for factored models: what a step is, not where it may lead; geometry comes from `retraction`.

`AdamW` with one rate for everything and a retraction after the step is the paper's (arXiv 2604.00733, section 3.2). One rate
cannot fit: at 5e-4 a unit column of 8192 entries turns by 0.045 rad in a step while a singular value of 10 moves by
0.005 %. `SpectralAdam` gives each kind of parameter a unit of its own:

- `stiefel` (U, V): the gradient's part along the manifold, a step of `rate` radians a column, back by a retraction. What
  is made of the momentum is projected to where X is now (StelLA, NeurIPS 2025). The step goes in Adam's direction, its second
  moments one a row and one a column (Adafactor, Shazeer and Stern, arXiv 1804.04235): nearly as good as one an entry, in
  m + k numbers instead of m k (table in `tests/benchmarks/training.py`). Or along the momentum's polar factor, which is as
  far in every direction that the momentum has a part in.
- `singular` (s): Adam on log s, so `rate` is a relative change and s stays positive; weight decay, as |W|_F = |s|.
- `plain` (everything else): Adam, entry by entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..tensors import by_shape
from .moments import begin_, get, put_, rounded

_PRIME: Final = 1_000_003

_FAINT: Final = 1e-8
"""Second moments of rows, over their mean, below which rows do not step as far as others: of nothing comes nothing."""

KINDS: Final = ("stiefel", "singular", "plain")

Map = Callable[[Tensor, Tensor], Tensor]


class SpectralAdam(Optimizer):
    """Adam in the units of what it moves; see the module.

    Args:
        groups: parameter groups, each with `params`, `kind` (one of `KINDS`) and `rate`.
        tangent: (X, G) -> the part of G that moves X along its manifold; for batches (b, m, k).
        retract: X -> the point of the manifold that X is brought back to; None where the caller does so.
        polar: momentum -> its polar factor, to step along; None for Adam's direction.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        clip: largest norm of the gradient of all parameters, 0 for none. Each one's is cut to an equal share of it, clip over the
            root of their number: so no parameter waits for the others, and a spike in one does not shorten their steps.
        weight_decay: share of log s by which s falls in a step of rate 1; of `singular` groups only.
        momentum: what first moments of matrices are kept in, one of `MOMENTA`; of vectors they stay float32.
        seed: of the rounding of parameters that are bfloat16.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        tangent: Map,
        retract: Callable[[Tensor], Tensor] | None,
        polar: Callable[[Tensor], Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        clip: float = 0.0,
        weight_decay: float = 0.0,
        momentum: str = "float32",
        seed: int = 0,
    ) -> None:
        checked: list[dict[str, Any]] = [dict(group) for group in groups]
        for group in checked:
            if group["kind"] not in KINDS:
                raise ValueError(f"kind {group['kind']!r}: one of {', '.join(KINDS)}")
        super().__init__(checked, {"betas": betas, "eps": eps, "weight_decay": weight_decay, "rate": 0.0})
        self._tangent, self._retract, self._polar, self._seed = tangent, retract, polar, seed
        self._places = {
            parameter: (group, place)
            for place, (group, parameter) in enumerate(
                (group, parameter) for group in self.param_groups for parameter in group["params"]
            )
        }
        self._longest = clip / max(1, len(self._places)) ** 0.5
        for parameter, (group, _) in self._places.items():
            # at once, before what comes and goes: what stays is not to lie between that and keep its pages
            state = self.state[parameter] = {"count": 0}
            begin_(state, "first", parameter.detach(), momentum if parameter.ndim > 1 else "float32")
            zeros = functools.partial(torch.zeros, dtype=torch.float32, device=parameter.device)
            if group["kind"] != "stiefel":
                state["second"] = zeros(parameter.shape)
            elif polar is None:
                state["second_rows"], state["second"] = (zeros(size) for size in parameter.shape)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step with the gradients that are there, factors of one shape together; see `by_shape`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            is_stacked = group["kind"] == "stiefel"
            for batch in by_shape(moving) if is_stacked else ([parameter] for parameter in moving):
                self._move(batch, group)
        return loss

    @torch.no_grad()
    def step_one(self, parameter: nn.Parameter) -> None:
        """The same for one parameter, in the middle of a backward pass say."""
        self._move([parameter], self._places[parameter][0])

    def _move(self, batch: list[nn.Parameter], group: dict[str, Any]) -> None:
        if group["kind"] == "stiefel":
            self._stiefel(batch, group)
        else:
            for parameter in batch:
                self._flat(parameter, group)

    def _stiefel(self, batch: list[nn.Parameter], group: dict[str, Any]) -> None:
        X = _stacked([parameter.detach() for parameter in batch])
        gradient = self._tangent(X, _stacked([self._gradient(parameter) for parameter in batch]))
        states, eps = [self._state(parameter) for parameter in batch], group["eps"]
        first = _stacked([_recalled(state, eps) for state in states]).lerp_(gradient, 1.0 - group["betas"][0])
        by = None
        if self._polar is not None:
            first = self._tangent(X, first)
            X = X.float() - group["rate"] * self._polar(first)
        else:
            by = rows, columns = self._by_rows_and_columns(gradient, states, group)
            del gradient  # as large as what comes now
            X = self._tangent(X, (first * rows).mul_(columns)).neg_().add_(X)
        X = self._retract(X) if self._retract else X
        for place, (parameter, state) in enumerate(zip(batch, states, strict=True)):
            lost = self._put(parameter, X[place], state)
            if lost is not None and by is not None:
                _owe_(first[place], lost, by[0][place] * by[1][place], group["betas"][0])
            _remember(state, first[place], eps)

    def _by_rows_and_columns(
        self, gradient: Tensor, states: list[dict[str, Any]], group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """What Adam multiplies the momentum with, (b, m, 1) and (b, 1, k), after taking the gradient in.

        Rows first, over their mean; of what that makes of the gradient the columns, so that each turns by `rate`.
        """
        counts = torch.tensor([state["count"] for state in states], dtype=torch.float32, device=gradient.device)
        # one count each: not all need have had a gradient in each step
        one, two = ((1.0 - beta**counts)[:, None] for beta in group["betas"])

        def moment(name: str, values: Tensor) -> Tensor:
            for state, value in zip(states, values, strict=True):
                state[name].lerp_(value, 1.0 - group["betas"][1])
            return torch.stack([state[name] for state in states]) / two

        rows = moment("second_rows", gradient.square().mean(-1))
        rows = (rows / rows.mean(-1, keepdim=True)).nan_to_num_(0.0).clamp_min_(_FAINT).rsqrt_()[:, :, None]
        columns = moment("second", (gradient * rows).square_().mean(-2))
        by = group["rate"] / (gradient.shape[-2] ** 0.5 * one * columns.sqrt_().add_(group["eps"]))
        return rows, by[:, None, :]

    def _flat(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        is_singular = group["kind"] == "singular"
        state, rate, eps = self._state(parameter), group["rate"], group["eps"]
        gradient, value = self._gradient(parameter), parameter.float()
        if is_singular:
            gradient = gradient * value
        first = _recalled(state, eps).lerp_(gradient, 1.0 - group["betas"][0])
        state["second"].mul_(group["betas"][1]).addcmul_(gradient, gradient, value=1.0 - group["betas"][1])
        one, two = (1.0 - beta ** state["count"] for beta in group["betas"])
        # the one copy that is made: an embedding is the largest tensor there is
        by = (state["second"] / two).sqrt_().add_(eps).reciprocal_().mul_(rate / one)
        if is_singular:
            value = value * torch.exp(-(by * first + rate * group["weight_decay"]))
        else:
            value.addcmul_(first, by, value=-1.0)
        lost = self._put(parameter, value, state)
        if lost is not None:
            _owe_(first, lost, by, group["betas"][0])
        _remember(state, first, eps)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """float32, no longer than it may be."""
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        if self._longest:
            gradient.mul_((self._longest / torch.linalg.vector_norm(gradient)).clamp_(max=1.0))
        return gradient

    def _put(self, parameter: nn.Parameter, value: Tensor, state: dict[str, Any]) -> Tensor | None:
        """Gives a parameter a value float32; returns what of it was lost, None where nothing was."""
        if parameter.dtype != torch.bfloat16:
            parameter.copy_(value)
            return None
        generator = torch.Generator(parameter.device)
        generator.manual_seed((self._seed * _PRIME + state["count"]) * _PRIME + self._places[parameter][1])
        parameter.copy_(rounded(value, generator))
        return value - parameter

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        state["count"] += 1
        return state


def _recalled(state: dict[str, Any], eps: float) -> Tensor:
    """The momentum, float32; see `_remember`."""
    first = get(state, "first")
    return first.mul_(_unit(state, eps)) if state["first"].dtype == torch.int8 else first


def _remember(state: dict[str, Any], first: Tensor, eps: float) -> None:
    """Keeps it; in 8 bits as the step that it makes.

    8 bits hold what is like the largest of a block. Gradients of a dense matrix differ by thousands from entry to entry, those
    of a factor from row to row, and Adam steps as far for the small ones.
    """
    put_(state, "first", first / _unit(state, eps) if state["first"].dtype == torch.int8 else first)


def _unit(state: dict[str, Any], eps: float) -> Tensor | float:
    """What a momentum is counted in: the root of the second moment of each row or entry, 1 where there are none."""
    if "second_rows" in state:
        return state["second_rows"].sqrt().add_(eps)[:, None]
    return state["second"].sqrt().add_(eps) if "second" in state else 1.0


def _owe_(first: Tensor, lost: Tensor, by: Tensor, beta: float) -> None:
    """Puts what rounding took from a parameter into its momentum, float32, so that coming steps give it back; spends `lost`.

    A step is `by * first`, and what is in a momentum stays there by `beta`: of `(1 / beta - 1) lost / by` all of `lost` arrives,
    a tenth of what is still missing a step. So roundings do not add up over a run. (Without master weights, as ECO,
    Nikdan et al., arXiv 2601.22101, has it.)
    """
    owed = lost.div_(by).mul_(1.0 / beta - 1.0).masked_fill_(by <= torch.finfo(by.dtype).tiny, 0.0)
    first.sub_(owed)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """(b, ...); of one alone a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def turn_(optimizer: Optimizer, rotations: Mapping[nn.Parameter, Tensor]) -> None:
    """Turns what an optimiser keeps of parameters (m, k) whose columns were turned by orthogonal P (k, k): X -> X P.

    First moments turn along; of second moments the expectation does, with the squares of P; those of rows stay.
    """
    for parameter, P in rotations.items():
        state = optimizer.state.get(parameter, {})
        for name, turn in (("first", P), ("exp_avg", P), ("second", P.square()), ("exp_avg_sq", P.square())):
            if name in state:
                put_(state, name, get(state, name) @ turn.float())
