"""Scores of a detector.

`coco` has COCO's twelve numbers, `voc` Pascal VOC's average precision, `errors` what costs AP (TIDE); `report` puts
them together.
"""
