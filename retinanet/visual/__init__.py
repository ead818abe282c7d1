"""Images of data, networks and results.

Read `drawing` first (boxes and sheets, with the names that `text` makes drawable); then `views` (annotations,
batches, detections beside the ground truth) and `anchor_views` (anchors, matches). `charts` draws numbers,
`heatmaps` features and losses. `anchor_fit` measures whether anchors fit a data set, `anchor_report` says and draws it.
"""
