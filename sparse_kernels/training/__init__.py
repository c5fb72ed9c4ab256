"""Training a sparse network: the rules, the growth signals, and the driver that applies them."""

from .averages import follow
from .capacity import reserve
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from .config import SparseMomentumConfig
from .costs import flops_per_weight, time_per_weight
from .data_parallel import attach
from .methods import METHODS, Method, method
from .rewrite import rewrite
from .rules import Candidates, GrowthRule, LayerState, PruneRule, RedistributionRule
from .schedule import UpdateSchedule, window_length
from .sparse_momentum import SparseMomentum
from .tuning import tune
from .update import UpdateRecord

__all__ = [
    "METHODS",
    "Candidates",
    "Checkpoint",
    "CheckpointError",
    "GrowthRule",
    "LayerState",
    "Method",
    "PruneRule",
    "RedistributionRule",
    "SparseMomentum",
    "SparseMomentumConfig",
    "UpdateRecord",
    "UpdateSchedule",
    "attach",
    "flops_per_weight",
    "follow",
    "latest_checkpoint",
    "load_checkpoint",
    "method",
    "reserve",
    "rewrite",
    "save_checkpoint",
    "time_per_weight",
    "tune",
    "window_length",
]
