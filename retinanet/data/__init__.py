"""From files to batches.

`images` reads image files; `dataset` is what all data sets share; `csv`, `coco`, `voc`, `yolo` and `shapes` are the
formats, each a reader and its class; `transforms` change samples; `sampler` and `loader` make batches. `report` and
`checks` say what is wrong with a data set.
"""
