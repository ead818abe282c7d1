"""RetinaNet ("Focal Loss for Dense Object Detection", Lin et al., 2017) to read, to train and to trust."""

__version__ = "1.0.0"
