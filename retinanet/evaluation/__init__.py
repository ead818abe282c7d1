"""Scores: `coco` gives COCO's twelve numbers, `voc` Pascal VOC's average precision, `errors` what costs AP (TIDE)."""
