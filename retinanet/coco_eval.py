"""COCO's evaluation, under the original's import path."""

from retinanet.evaluation.coco import evaluate_coco

__all__ = ["evaluate_coco"]
