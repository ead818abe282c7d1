"""RetinaNet ("Focal Loss for Dense Object Detection", Lin et al., 2017) to read, to train and to trust."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.inference import predict as predict

__version__ = "1.0.0"


def __dir__() -> list[str]:
    return [*globals(), "predict"]


def __getattr__(name: str) -> Any:
    """`retinanet.predict`, imported at first use, so that `import retinanet` stays light."""
    if name == "predict":
        from retinanet.inference import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
