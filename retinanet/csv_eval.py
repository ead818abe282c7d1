"""The evaluation of CSV data, under the original's import path."""

from retinanet.evaluation.voc import compute_overlap, evaluate

__all__ = ["compute_overlap", "evaluate"]
