"""Training on the factors; the dense matrix of a factored layer never exists."""

from .callback import RetractionCallback
from .checkpoint import restore, save_checkpoint, save_model
from .data import Batch, TrainData, load_data
from .loop import Progress, TrainState, start, train
from .options import TrainError, TrainOptions
from .plan import estimate, fitted
from .run import Files, TeacherSource, load_weights, run
from .teacher import CachedTeacher, ModelTeacher, Teacher, write_cache

__all__ = [
    "Batch",
    "CachedTeacher",
    "Files",
    "ModelTeacher",
    "Progress",
    "RetractionCallback",
    "Teacher",
    "TeacherSource",
    "TrainData",
    "TrainError",
    "TrainOptions",
    "TrainState",
    "estimate",
    "fitted",
    "load_data",
    "load_weights",
    "restore",
    "run",
    "save_checkpoint",
    "save_model",
    "start",
    "train",
    "write_cache",
]
