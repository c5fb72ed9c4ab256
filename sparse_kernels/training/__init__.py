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
from .data_parallel import attach
from .rewrite import rewrite
from .rules import Candidates, GrowthRule, LayerState, PruneRule, RedistributionRule
from .schedule import UpdateSchedule, window_length
from .sparse_momentum import SparseMomentum
from .tuning import tune
from .update import UpdateRecord

__all__ = [
    "Candidates",
    "Checkpoint",
    "CheckpointError",
    "GrowthRule",
    "LayerState",
    "PruneRule",
    "RedistributionRule",
    "SparseMomentum",
    "SparseMomentumConfig",
    "UpdateRecord",
    "UpdateSchedule",
    "attach",
    "follow",
    "latest_checkpoint",
    "load_checkpoint",
    "reserve",
    "rewrite",
    "save_checkpoint",
    "tune",
    "window_length",
]
