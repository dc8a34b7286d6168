"""What a training run can be told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import torch

from sctconv.formats.errors import SctError

from ..precision import has_fast_bf16
from ..retraction import METHODS
from .moments import MOMENTA

RETRACTIONS: Final = (*METHODS, "absorb", "none")

SCHEDULES: Final = ("cosine", "wsd", "constant")
OPTIMIZERS: Final = ("spectral", "adamw")
PARTS: Final = ("all", "factors", "norms")
LEVERS: Final = ("checkpointing", "micro_batch", "step_in_backward", "momentum", "weights")
"""Options that cost time or precision and save memory."""
CHECKPOINTINGS: Final = ("none", "blocks", "factors")


DIRECTIONS: Final = ("adam", "polar")

TUNING: Final = {
    "direction": "adam",
    "rate": 1e-4,
    "angle": 3e-3,
    "singular_rate": 1e-3,
    "norm_rate": 3e-4,
    "embedding_rate": 0.0,
}
"""Rates for a model that knows something already: gentle, and its embeddings stay."""

SCRATCH: Final = {
    "direction": "polar", "rate": 1e-3, "angle": 0.05, "singular_rate": 0.01, "norm_rate": 1e-3, "embedding_rate": 1e-3
}  # fmt: skip
"""Rates for a model that `sctconv init` began (`python -m tests.benchmarks.scratch --steps 100`, nats a byte).

| rank | the paper's AdamW | adam | polar |
|---|---|---|---|
| 32 | 2.533 | 0.03: 2.589, 0.1: 2.453 | 0.02: 2.228, 0.05: 2.165, 2.148 * |
| 64 | 2.497 | | 0.05: 2.081, 2.085 * |
| 128 | 2.461 | 0.02: 2.492, 0.04: 2.472, 0.1: 2.796 | 0.02: 2.123, 0.05: 2.135, 2.095 * |

(* each parameter's gradient clipped alone, as now.)

Of the other rates, at rank 32 after 60 steps of adam at 0.1: s at 0.003 2.693, 0.01 2.678, 0.03 2.758; embeddings at 3e-3 2.712.
A calibrated start gains nothing by polar: perplexity after 100 steps 45.0 at 0.002, adam at 0.003 42.9 with second moments by
columns alone; for those see `tests/benchmarks/training.py`.
"""


class TrainError(SctError):
    """A training run cannot start or go on."""


@dataclass(frozen=True)
class TrainOptions:
    """Length, rates and checks of a run.

    Rates that are None become those of `TUNING` or `SCRATCH`, whichever suits the model; see `resolved`.

    Attributes:
        steps: of the optimiser.
        batch: windows of a step; micro_batch: windows that go through the model at once.
        context: tokens in a window.
        optimizer: `spectral` (each kind of parameter in its own unit) or `adamw` (the paper's: one rate, then QR).
        direction: of a step of U and V in `spectral`: `adam`, with second moments of rows and of columns, or `polar`, the
            momentum's polar factor, as Muon has it.
        rate: of `adamw`, and of dense matrices in `spectral`.
        angle: radians that a column of U or V turns in a step of `spectral`.
        singular_rate: relative change of s in a step of `spectral`.
        norm_rate, embedding_rate: of vectors and of embeddings with the head; 0 freezes them. Factored ones move as all
            factors do.
        weight_decay: of s.
        clip: largest norm of the gradient of all parameters, 0 for none; with `spectral` each one's is cut to an equal share of
            it. A model that is being tuned has norms far above 1, so that steps weigh alike in the moments: without it the first
            of them, the steepest, would rule for a hundred steps.
        schedule: `cosine`, `wsd` (constant, the last fifth falling to nothing) or `constant`, after the warm-up.
        warm_up: share of the steps in which rates rise from nothing.
        retraction: `qr`, `householder`, `polar`; `absorb`, which leaves the layer's function as the step made it; or `none`
            until the end.
        retract_every: steps between retractions with `adamw`.
        train: `all`, `factors` or `norms`.
        bf16: whether products are bfloat16; weights and moments stay float32. None for where the device multiplies so faster.
        checkpointing: what the backward pass finds: `none`, all activations; `blocks`, the input of each block, what is in
            between being computed again; `factors`, of each block only what the last layers of its attention and MLP give
            between their factors, from which its input follows too (see `runtime.train.reversal`).
        step_in_backward: whether each parameter moves the moment its gradient is whole, and the gradient goes: none but that
            of the head is ever kept. With `spectral` only.
        momentum: what first moments of matrices are kept in: `float32`, `bfloat16` or `int8`. With `spectral` only.
        weights: what matrices are kept in: `float32`, or `bfloat16` rounded at random after each step.
        teacher_weight: share of the loss that is the KL to the teacher's distribution, the rest being cross-entropy.
        temperature: of that KL.
        teacher_top: successors of each token that a teacher's cache keeps.
        document_masks: whether tokens see only the document that they are of.
        held_out: share of the windows that is kept aside to measure on.
        eval_every: steps between looks at them; 0 for only the first and the last.
        patience: looks in a row without a better one after which the run ends; 0 for never.
        seed: of the order of the windows.

    Raises:
        TrainError: a value is out of range.
    """

    steps: int = 300
    batch: int = 4
    micro_batch: int = 2
    context: int = 512
    optimizer: Literal["spectral", "adamw"] = "spectral"
    direction: Literal["adam", "polar"] | None = None
    rate: float | None = None
    angle: float | None = None
    singular_rate: float | None = None
    norm_rate: float | None = None
    embedding_rate: float | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: str = "cosine"
    warm_up: float = 0.05
    retraction: str = "qr"
    retract_every: int = 1
    train: str = "all"
    bf16: bool | None = None
    checkpointing: str = "none"
    step_in_backward: bool = False
    momentum: str = "float32"
    weights: str = "float32"
    teacher_weight: float = 0.5
    temperature: float = 1.0
    teacher_top: int = 64
    document_masks: bool = False
    held_out: float = 0.05
    eval_every: int = 50
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        leasts = {"steps": 1, "batch": 1, "micro_batch": 1, "retract_every": 1, "teacher_top": 1, "context": 2}
        for name, least in {**leasts, "eval_every": 0, "patience": 0}.items():
            if getattr(self, name) < least:
                raise TrainError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}")
        if self.batch % self.micro_batch:
            raise TrainError(f"--batch {self.batch}: not a multiple of --micro-batch {self.micro_batch}")
        for name in ("rate", "angle", "singular_rate", "norm_rate", "embedding_rate", "weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise TrainError(f"--{name.replace('_', '-')} {value}: not negative and finite")
        for name in ("warm_up", "teacher_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise TrainError(f"--{name.replace('_', '-')} {getattr(self, name)}: between 0 and 1")
        if not 0.0 < self.held_out < 1.0:
            raise TrainError(f"--held-out {self.held_out}: between 0 and 1, both excluded")
        if self.patience and not self.eval_every:
            raise TrainError(f"--patience {self.patience}: needs looks at the held-out windows; give --eval-every")
        if not self.temperature > 0.0:
            raise TrainError(f"--temperature {self.temperature}: above 0")
        choices: dict[str, tuple[str, ...]] = {
            "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "retraction": RETRACTIONS, "train": PARTS,
            "direction": DIRECTIONS, "checkpointing": CHECKPOINTINGS, "momentum": MOMENTA, "weights": MOMENTA[:2],
        }  # fmt: skip
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise TrainError(f"--{name} {value}: choose one of {', '.join(allowed)}")
        if self.weights == "bfloat16" and self.bf16 is False:
            raise TrainError("--weights bfloat16: their products are bfloat16 too; leave out --no-bf16")
        if self.angle is not None and self.angle > math.pi / 2:
            raise TrainError(f"--angle {self.angle:g}: radians of a step, at most a right angle, {math.pi / 2:.3f}")
        own: dict[str, Any] = {
            "direction": None,
            "step_in_backward": False,
            "momentum": "float32",
            "weights": "float32",
            "angle": None,  # with adamw `rate` is that of all
            "singular_rate": None,
        }
        for name, usual in own.items():
            if self.optimizer == "adamw" and getattr(self, name) != usual:
                raise TrainError(f"--{name.replace('_', '-')}: needs --optimizer spectral")

    def resolved(self, device: torch.device, *, scratch: bool = False) -> TrainOptions:
        """The same with nothing left open.

        AdamW has one for everything; norms and embeddings have it too unless they are given their own.

        Args:
            device: where training is to be.
            scratch: whether the model was begun from nothing.
        """
        rates: dict[str, Any] = dict(SCRATCH if scratch else TUNING)
        if self.optimizer == "adamw":
            for name in ("direction", "angle", "singular_rate"):
                del rates[name]
            rates["norm_rate"] = rates["rate"]
            rates |= dict.fromkeys(("norm_rate", "embedding_rate"), self.rate) if self.rate is not None else {}
        answers = {**rates, "bf16": self.weights == "bfloat16" or has_fast_bf16(device)}
        return replace(self, **{name: answer for name, answer in answers.items() if getattr(self, name) is None})

    @property
    def is_lean(self) -> bool:
        """Whether memory matters more than time."""
        return self.checkpointing != "none" or self.step_in_backward

    def factor(self, step: int) -> float:
        """What all rates are multiplied with in a step, counted from 0."""
        warm = max(1, round(self.warm_up * self.steps)) if self.warm_up else 0
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        if self.schedule == "wsd":
            return min(1.0, (1.0 - done) / 0.2)
        return 1.0

    def to_json(self) -> dict[str, Any]:
        """All of it, for provenance and to compare with on resuming."""
        return asdict(self)
