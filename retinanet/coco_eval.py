"""Where the original's users import COCO's evaluation from."""

from retinanet.evaluation.coco import evaluate_coco

__all__ = ["evaluate_coco"]
