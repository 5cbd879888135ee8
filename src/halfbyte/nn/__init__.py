"""Training with quantized operands, on any device: `docs/training.md`."""

from .convert import Layer, Report, convert, revert
from .distillation import distillation_loss
from .experts import GroupedLinear
from .linear import Linear
from .operands import AmaxGroups
from .statistics import Rule, Watcher, read_rules

__all__ = [
    "AmaxGroups",
    "GroupedLinear",
    "Layer",
    "Linear",
    "Report",
    "Rule",
    "Watcher",
    "convert",
    "distillation_loss",
    "read_rules",
    "revert",
]
