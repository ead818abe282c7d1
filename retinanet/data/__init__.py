"""From files to batches.

In reading order: `dataset` is the base of all data sets; `csv`, `coco`, `voc`, `yolo` and `shapes` are the formats,
each its class and reader in one file; `images` reads image files; `transforms` change samples; `sampler` and `loader`
make batches. `reading` is what the readers share, `layouts` names of sets, `classes` those of classes, `tables` the
columns of CSV files; `ground_truth` is what COCO's evaluation takes of any data set; `placing` turns and scales boxes
whose images were; `report` and `checks` say what is wrong with a data set.
"""
