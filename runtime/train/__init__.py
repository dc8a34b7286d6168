"""Training on the factors; the dense matrix of a factored layer never exists."""

from .checkpoint import restore, save_checkpoint, save_model
from .data import TrainData, load_data
from .loop import Progress, TrainState, start, train
from .options import TrainError, TrainOptions
from .run import Files, run

__all__ = [
    "Files",
    "Progress",
    "TrainData",
    "TrainError",
    "TrainOptions",
    "TrainState",
    "load_data",
    "restore",
    "run",
    "save_checkpoint",
    "save_model",
    "start",
    "train",
]
