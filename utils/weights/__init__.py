"""Weights from elsewhere: `load_backbone` is all that other rooms need of this one."""

from utils.weights.load import LoadReport, compare_input, load_backbone

__all__ = ["LoadReport", "compare_input", "load_backbone"]
