"""Weights from elsewhere. Other rooms need only these names of this one."""

from utils.weights.load import LoadReport, compare_input, load_backbone

__all__ = ["LoadReport", "compare_input", "load_backbone"]
