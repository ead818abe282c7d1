"""Images of data, networks and results.

Read `drawing` first (boxes and sheets, with the names that `text` makes drawable); then `data_views` (annotations,
batches), `anchor_views` (anchors, matches) and `views` (detections beside the ground truth). `charts` draws numbers,
`heatmaps` features and losses. `anchor_fit` measures whether anchors fit a data set, `anchor_report` says and draws it.
"""
