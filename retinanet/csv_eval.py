"""Where the original's users import the evaluation of CSV data from."""

from retinanet.evaluation.voc import compute_overlap, evaluate

__all__ = ["compute_overlap", "evaluate"]
