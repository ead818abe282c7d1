"""RetinaNet ("Focal Loss for Dense Object Detection", Lin et al., 2017) to read, to train and to trust."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.api import train as train
    from retinanet.api import validate as validate
    from retinanet.inference import predict as predict

__version__ = "1.0.0"


def __dir__() -> list[str]:
    return [*globals(), "predict", "train", "validate"]


def __getattr__(name: str) -> Any:
    """Import `predict`, `train` or `validate` at first use, so that `import retinanet` stays fast."""
    if name in ("train", "validate"):
        from retinanet import api

        return getattr(api, name)
    if name == "predict":
        from retinanet.inference import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
