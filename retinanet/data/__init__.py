"""From files to batches.

In reading order: `dataset` is the base of all data sets; `csv`, `coco`, `voc`, `yolo` and `shapes` hold one format
each, its class and its reader; `images` reads image files; `transforms` changes samples; `sampler` and `loader` make
batches. `reading` holds what the readers share, `layouts` the names of sets, `classes` the names of classes, and
`tables` the columns of CSV files. `ground_truth` prepares any data set for COCO's evaluation; `placing` turns and
scales the boxes of images that were turned or resized after annotation; `report` and `checks` say what is wrong with a
data set.
"""
