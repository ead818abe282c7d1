"""Images of data, networks and results.

Read `drawing` first (boxes and contact sheets, with names that `text` makes drawable); then `views` (annotations,
batches, detections beside the ground truth) and `anchor_views` (anchors, matches). `charts` draws numbers, `heatmaps`
features and losses. `anchor_fit` measures how well anchors fit a data set, and `anchor_report` reports and draws it.
"""
