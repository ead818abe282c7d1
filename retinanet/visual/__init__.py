"""Pictures of data, networks and results.

`drawing` puts boxes on images, `views` shows data, anchors, matches and detections, `heatmaps` features and losses,
`charts` numbers, and `anchor_fit` whether anchors fit a data set.
"""
