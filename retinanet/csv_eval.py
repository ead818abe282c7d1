"""Where the original's users import the evaluation of CSV data from."""

from retinanet.evaluation.voc import evaluate

__all__ = ["evaluate"]
