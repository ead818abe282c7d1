"""From files to batches.

In reading order: `dataset` is the base of all data sets; `csv`, `coco`, `voc`, `yolo` and `shapes` hold one format
each, its class and its reader; `images` reads image files (`pixels`, `tiff` and `deep` those of more than 8 bits) and
`video` videos; `samples` says what a sample is; `transforms` changes samples, and `tiles` cuts large images; `sampler`
and `loader` make batches. `files` finds images; `reading` holds what the readers share, `layouts` the names of sets,
`classes` the names of classes, and `tables` the columns of CSV files. `ground_truth` prepares any data set for COCO's
evaluation; `placing` turns and scales the boxes of images that were turned or resized after annotation; `report` and
`checks` say what is wrong with a data set.
"""
