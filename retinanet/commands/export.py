"""Take a trained RetinaNet elsewhere: to ONNX Runtime, to torch.export, or to C++ through AOTInductor.

    python -m retinanet.export --model runs/train/best.pt --format onnx --with_nms --dynamic

The exported network takes pictures as they are, uint8 RGB [B, 3, H, W]: the normalisation is inside. It gives either
`logits` [B, A, K] and `boxes` [B, A, 4] of all anchors, or with `--with_nms`, for one picture, the detections:
`scores` [N], `labels` [N] and `boxes` [N, 4], best first. Boxes are xyxy, pixels of the input.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import nms

from retinanet.boxes import box_iou, clip_boxes, decode_boxes
from retinanet.commands.flags import fraction, make_parser, positive_int
from retinanet.data.images import read_image
from retinanet.data.transforms import PIXEL_MEAN, PIXEL_STD, SIZE_DIVISOR, normalize
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.postprocess import MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD, TOP_K
from retinanet.process import log, script, setup_logging
from retinanet.training.checkpoint import load_model

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "aot_inductor": ".aoti.pt2"}
OUTPUTS = {False: ["logits", "boxes"], True: ["scores", "labels", "boxes"]}

# A dynamic side has these limits, pixels: below, P7 has a single row or column, which torch.export treats as a
# special case.
MIN_DYNAMIC_SIDE, MAX_DYNAMIC_SIDE = 129, 4096
MAX_DYNAMIC_BATCH = 256
CHECK_SIZES = ((320, 448), (417, 333))  # height and width, pixels, where a dynamic network is compared

LOGIT_TOLERANCE = 1e-4  # of the largest logit
SCORE_TOLERANCE = 1e-4
MIN_IOU = 0.99  # of a detection with its counterpart


class Detector(nn.Module):
    """A RetinaNet with its pre- and post-processing, in operations that can be exported.

    Args:
        net: in evaluation mode.
        with_nms: give detections instead of logits and boxes.
        score_threshold: scores must be above it.
        nms_threshold: of two boxes of a class that overlap by more than this IoU, the better one stays.
        max_detections: detections of a picture.
    """

    def __init__(
        self,
        net: RetinaNet,
        with_nms: bool = False,
        score_threshold: float = SCORE_THRESHOLD,
        nms_threshold: float = NMS_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
    ):
        super().__init__()
        self.net = net
        self.with_nms = with_nms
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        mean, std = torch.tensor(PIXEL_MEAN)[:, None, None], torch.tensor(PIXEL_STD)[:, None, None]
        self.register_buffer("pixel_scale", 1 / (255 * std))
        self.register_buffer("pixel_shift", mean / std)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] uint8 RGB -> logits and boxes, or with NMS (B is 1) scores, labels and boxes."""
        normal = images.float() * self.pixel_scale - self.pixel_shift  # `normalize`, without its writing in place
        logits, deltas, anchors = self.net.heads(normal)
        boxes = clip_boxes(decode_boxes(anchors, deltas), *images.shape[-2:])
        if self.with_nms:
            return self.select(logits[0], boxes[0], images.shape[-2], images.shape[-1])
        return logits, boxes

    def select(self, logits: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """`postprocess.select_detections` without branches that depend on the data, which a graph cannot hold.

        Args:
            logits: [A, K].
            boxes: [A, 4] xyxy, pixels of the input.
            height: of the input, pixels.
            width: of the input, pixels.
        """
        num_classes = logits.shape[1]
        sizes = self.net.anchors.level_sizes(height, width)
        candidates, offset = [], 0
        for level, size in zip(logits.split(sizes), sizes, strict=True):
            top_k = torch.sym_min(TOP_K, size * num_classes)
            candidates.append(level.flatten().topk(top_k).indices + offset)
            offset = offset + size * num_classes
        candidates = torch.cat(candidates)
        scores, boxes = logits.flatten()[candidates].sigmoid(), boxes[candidates // num_classes]
        good = (scores > self.score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        candidates, scores, boxes = candidates[good], scores[good], boxes[good]
        labels = candidates % num_classes
        # Classes are moved so far apart that they cannot overlap: one NMS then serves them all.
        apart = (labels * (torch.sym_max(height, width) + 1))[:, None]
        # torchvision tells torch.export that NMS keeps at least two boxes: two aside make it true, and go again.
        aside = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
        kept = nms(torch.cat([boxes + apart, aside]), torch.cat([scores, scores.new_zeros(2)]), self.nms_threshold)
        kept = kept[kept < candidates.shape[0]][: self.max_detections]
        return scores[kept], labels[kept], boxes[kept]


def trace(detector: Detector, size: tuple[int, int], dynamic: bool) -> ExportedProgram:
    """The detector as a graph.

    Args:
        detector: in evaluation mode.
        size: height and width of the input, pixels; an example where the sides are dynamic.
        dynamic: let height and width vary, and the batch where there is no NMS.
    """
    batch = 1 if detector.with_nms or not dynamic else 2
    shapes = None
    if dynamic:
        height, width = (Dim(side, min=MIN_DYNAMIC_SIDE, max=MAX_DYNAMIC_SIDE) for side in ("height", "width"))
        sides = {2: height, 3: width}
        shapes = (sides if detector.with_nms else {0: Dim("batch", min=1, max=MAX_DYNAMIC_BATCH), **sides},)
    with torch.no_grad():
        example = torch.zeros(batch, 3, *size, dtype=torch.uint8)
        return torch.export.export(detector, (example,), dynamic_shapes=shapes)


def save(program: ExportedProgram, path: Path, file_format: str, metadata: dict[str, str]) -> None:
    """Write a traced detector.

    Args:
        program: from `trace`.
        path: the file.
        file_format: a key of SUFFIXES.
        metadata: what travels with it.

    Raises:
        UserError: a library that the format needs is missing.
    """
    if file_format == "onnx":
        try:
            onnx_program = torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False)
        except ModuleNotFoundError as error:
            raise UserError(f"--format onnx needs {error.name}: pip install 'retinanet[onnx]'") from error
        for value, name in zip(onnx_program.model.graph.outputs, json.loads(metadata["outputs"]), strict=True):
            value.name = name
        onnx_program.model.metadata_props.update(metadata)
        onnx_program.save(path)
    elif file_format == "torch_export":
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})
    else:
        configs = {"aot_inductor.metadata": metadata}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def load(path: str | Path) -> tuple[Callable[[Tensor], list[Tensor]], dict[str, str]]:
    """An exported network as a function of pictures, and its metadata.

    Args:
        path: as written by `save`; its ending tells the format.

    Returns:
        [B, 3, H, W] uint8 -> the outputs, and the metadata: `class_names`, `min_side`, ...
    """
    if str(path).endswith(SUFFIXES["onnx"]):
        import onnxruntime  # an extra

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]

        return run, session.get_modelmeta().custom_metadata_map
    if str(path).endswith(SUFFIXES["aot_inductor"]):
        package = torch._inductor.aoti_load_package(str(path))
        return lambda images: list(package(images)), package.get_metadata()
    files = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=files).module()
    return lambda images: list(module(images)), json.loads(files["metadata.json"])


def check_picture(size: tuple[int, int], photograph: np.ndarray | None, seed: int) -> Tensor:
    """[1, 3, H, W] uint8: a photograph resized, or else smooth random colours.

    Args:
        size: height and width, pixels.
        photograph: [H', W', 3] uint8, or None.
        seed: of the random colours.
    """
    if photograph is None:
        generator = torch.Generator().manual_seed(seed)
        picture = torch.randint(0, 256, (1, 3, 8, 8), generator=generator, dtype=torch.uint8)
    else:
        picture = torch.from_numpy(photograph).permute(2, 0, 1)[None]
    return F.interpolate(picture, size, mode="bilinear", antialias=photograph is not None)


def unmatched(detections: Sequence[Tensor], others: Sequence[Tensor], min_score: float) -> int:
    """How many detections (scores, labels, boxes) above `min_score` have no counterpart among others.

    A counterpart is of the same class, and nearly of the same place and score. The scores need some room above
    the threshold: a detection exactly on it may come or go.
    """
    (scores, labels, boxes), (other_scores, other_labels, other_boxes) = detections, others
    equal = (labels[:, None] == other_labels) & (box_iou(boxes, other_boxes) >= MIN_IOU)
    equal &= (scores[:, None] - other_scores).abs() <= SCORE_TOLERANCE
    return int((~equal.any(dim=1) & (scores > min_score)).sum())


@torch.no_grad()
def compare(detector: Detector, exported: Callable[[Tensor], list[Tensor]], images: Tensor) -> str:
    """Compare an exported network with the eager one, on one picture.

    Args:
        detector: that was exported.
        exported: from `load`.
        images: [1, 3, H, W] uint8.

    Returns:
        A line on what was found.

    Raises:
        UserError: they differ by more than rounding.
    """
    height, width = images.shape[-2:]
    limits = (detector.score_threshold, detector.nms_threshold)
    eager = detector.net.detect(normalize(images), *limits, max_detections=detector.max_detections)[0]
    outputs, report, difference = exported(images), "", 0.0
    if not detector.with_nms:
        logits, _, _ = detector.net.heads(normalize(images))
        difference = float((outputs[0] - logits).abs().max() / logits.abs().max())
        report = f"logits within {difference:.1e} relative, "
        outputs = detector.select(outputs[0][0], outputs[1][0], height, width)
    # Where the list is full, the last of it may be another, too.
    floor = float(eager.scores[-1]) if len(eager.scores) == detector.max_detections else detector.score_threshold
    missed = unmatched(eager, outputs, floor + SCORE_TOLERANCE)
    invented = unmatched(outputs, eager, floor + SCORE_TOLERANCE)
    report = f"{height} x {width}: {report}{len(eager.scores)} detections, {missed} missed, {invented} invented"
    if difference > LOGIT_TOLERANCE or missed or invented:
        raise UserError(f"the exported network is not equal to the original at {report}")
    return report


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags -> values; a usage error exits with 2."""
    parser = make_parser(__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint, such as best.pt")
    parser.add_argument("--format", choices=sorted(SUFFIXES), default="onnx", help="what to write")
    parser.add_argument("--output", help="file to write (default: beside the checkpoint, with the format's ending)")
    parser.add_argument("--with_nms", action="store_true", help="give the detections of one picture")
    parser.add_argument("--dynamic", action="store_true", help="take pictures of any size above 128 pixels")
    parser.add_argument(
        "--height", type=positive_int, help="pixels, a multiple of 32 (default: the model's short side)"
    )
    parser.add_argument("--width", type=positive_int, help="pixels, a multiple of 32 (default: the model's long side)")
    parser.add_argument("--score_threshold", type=fraction, default=SCORE_THRESHOLD, help="scores must be above it")
    parser.add_argument("--nms_threshold", type=fraction, default=NMS_THRESHOLD, help="IoU, of --with_nms")
    parser.add_argument("--max_detections", type=positive_int, default=MAX_DETECTIONS, help="of --with_nms")
    parser.add_argument("--image", help="picture to compare with, in place of random colours")
    args = parser.parse_args(argv)
    if args.dynamic and (args.height or args.width):
        parser.error("--dynamic takes any size: leave out --height and --width")
    return args


@script
def main(argv: list[str] | None = None) -> None:
    """Export as the flags say, and compare with the eager network."""
    args = parse_arguments(argv)
    setup_logging()
    net, info = load_model(args.model)
    detector = Detector(net, args.with_nms, args.score_threshold, args.nms_threshold, args.max_detections).eval()
    sizes = CHECK_SIZES
    if not args.dynamic:
        sides = args.height or info["min_side"], args.width or info["max_side"]
        sizes = [tuple(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in sides)] * 2
        if sides != sizes[0]:
            log.info("the input has %d x %d pixels: sides are rounded up to multiples of %d", *sizes[0], SIZE_DIVISOR)
    elif info["min_side"] < MIN_DYNAMIC_SIDE:
        log.warning(
            "warning: the model knows short sides of %d pixels; what --dynamic gives takes none below %d",
            info["min_side"], MIN_DYNAMIC_SIDE,
        )  # fmt: skip
    path = Path(args.output) if args.output else Path(args.model).with_suffix(SUFFIXES[args.format])
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}")
    if not path.name.endswith(SUFFIXES[args.format]):
        raise UserError(f"--output {path}: must end in {SUFFIXES[args.format]}")
    photograph = read_image(args.image) if args.image else None

    metadata = {
        "class_names": json.dumps(info["class_names"]),
        "outputs": json.dumps(OUTPUTS[args.with_nms]),
        "input": "images: uint8 RGB, batch x 3 x height x width",
        "min_side": str(info["min_side"]),
        "max_side": str(info["max_side"]),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*create_unbacked_symint", FutureWarning)  # of torchvision's NMS
        save(trace(detector, sizes[0], args.dynamic), path, args.format, metadata)
    exported, _ = load(path)
    for seed, size in enumerate(sizes):
        log.info("%s", compare(detector, exported, check_picture(size, photograph, seed)))
    log.info("%s: %.1f MB, %d classes", path, path.stat().st_size / 1e6, len(info["class_names"]))


if __name__ == "__main__":
    sys.exit(main())
