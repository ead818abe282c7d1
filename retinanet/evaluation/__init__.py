"""Scores of a detector.

`coco` computes COCO's twelve numbers, `voc` Pascal VOC's average precision, `thresholds` the scores above which
detections are worth keeping, and `errors` what costs AP (TIDE); `report` combines them, as text and JSON files, and
`web_report` as the page report.html, whose images are chosen and described in `gallery`.
"""
