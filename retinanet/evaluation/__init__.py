"""Scores of a detector.

`coco` has COCO's twelve numbers, `voc` Pascal VOC's average precision, `thresholds` the scores above which detections
are worth keeping, `errors` what costs AP (TIDE); `report` puts them together.
"""
