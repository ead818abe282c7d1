"""Export a trained RetinaNet to ONNX Runtime, to torch.export, or to C++ through AOTInductor.

    python -m retinanet export --model runs/train/best.pt --format onnx --with_nms --dynamic

The exported network takes images as uint8 RGB [B, 3, H, W] and normalises them itself. It returns `logits` [B, A, K]
and `boxes` [B, A, 4] of all anchors, or with `--with_nms` the detections of one image: `scores` [N], `labels` [N] and
`boxes` [N, 4], best first. Boxes are xyxy, pixels of the input.
"""

import argparse
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import nms

from retinanet import postprocess
from retinanet.boxes import box_iou, clip_boxes, decode_boxes
from retinanet.commands import flags
from retinanet.data.images import read_image
from retinanet.data.transforms import PIXEL_MEAN, PIXEL_STD, SIZE_DIVISOR, normalize
from retinanet.errors import UserError, output_file
from retinanet.inference import detection_limits
from retinanet.model import RetinaNet
from retinanet.postprocess import Detections
from retinanet.process import log, script, setup_logging
from retinanet.training.checkpoint import load_model
from retinanet.training.files import replaced

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "aot_inductor": ".aoti.pt2"}
OUTPUTS = {False: ["logits", "boxes"], True: ["scores", "labels", "boxes"]}

# Limits of a dynamic side, pixels. Below, P7 has a single row or column, which torch.export treats as a special case.
MIN_DYNAMIC_SIDE, MAX_DYNAMIC_SIDE = 129, 4096
MAX_DYNAMIC_BATCH = 256
CHECK_SIZES = ((320, 448), (417, 333))  # height and width, pixels, at which a dynamic network is compared

# Differences that count as rounding: adding in another order changes about the sixth digit of a float32.
LOGIT_TOLERANCE = 1e-4  # relative to the largest logit
SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE = 0.1  # pixels, for each corner
IOU_TOLERANCE = 0.01


class Detector(nn.Module):
    """A RetinaNet with its pre- and post-processing, in operations that can be exported; thresholds as in `detect`."""

    def __init__(
        self,
        net: RetinaNet,
        with_nms: bool = False,
        score_threshold: float = postprocess.SCORE_THRESHOLD,
        nms_threshold: float = postprocess.NMS_THRESHOLD,
        top_k: int = postprocess.TOP_K,
        max_detections: int = postprocess.MAX_DETECTIONS,
    ):
        super().__init__()
        self.net, self.with_nms = net, with_nms
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.top_k, self.max_detections = top_k, max_detections
        mean, std = torch.tensor(PIXEL_MEAN)[:, None, None], torch.tensor(PIXEL_STD)[:, None, None]
        self.register_buffer("pixel_scale", 1 / (255 * std))
        self.register_buffer("pixel_shift", mean / std)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] uint8 RGB -> logits and boxes, or with NMS (B is 1) scores, labels and boxes."""
        normal = images.float() * self.pixel_scale - self.pixel_shift  # `normalize`, not in place
        logits, deltas, anchors = self.net.heads(normal)
        boxes = clip_boxes(decode_boxes(anchors, deltas), *images.shape[-2:])
        return self.select(logits[0], boxes[0], *images.shape[-2:]) if self.with_nms else (logits, boxes)

    def select(self, logits: Tensor, boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """`select_detections` on logits [A, K] and boxes [A, 4], without branches on data: a graph has none."""
        num_classes = logits.shape[1]
        candidates, offset = [], 0
        for level in logits.split(self.net.anchors.level_sizes(height, width)):
            size = level.shape[0] * num_classes
            candidates.append(level.flatten().topk(torch.sym_min(self.top_k, size)).indices + offset)
            offset = offset + size
        candidates = torch.cat(candidates)
        scores, boxes = logits.flatten()[candidates].sigmoid(), boxes[candidates // num_classes]
        good = (scores > self.score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        candidates, scores, boxes = candidates[good], scores[good], boxes[good]
        labels = candidates % num_classes
        # Boxes of different classes are moved apart, so that one NMS serves all classes.
        apart = (labels * (torch.sym_max(height, width) + 1))[:, None]
        # torchvision tells torch.export that NMS keeps two boxes or more: two extra ones ensure it.
        extra = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
        kept = nms(torch.cat([boxes + apart, extra]), torch.cat([scores, scores.new_zeros(2)]), self.nms_threshold)
        kept = kept[kept < candidates.shape[0]][: self.max_detections]
        return scores[kept], labels[kept], boxes[kept]


def trace(detector: Detector, size: tuple[int, int], dynamic: bool) -> ExportedProgram:
    """Trace the detector for inputs of one size, pixels, or if `dynamic`, of any size and (without NMS) batch size."""
    batch, shapes = 1, None
    if dynamic:
        height, width = (Dim(side, min=MIN_DYNAMIC_SIDE, max=MAX_DYNAMIC_SIDE) for side in ("height", "width"))
        shapes = {2: height, 3: width}
        if not detector.with_nms:
            batch, shapes[0] = 2, Dim("batch", min=1, max=MAX_DYNAMIC_BATCH)
    with torch.no_grad():
        example = torch.zeros(batch, 3, *size, dtype=torch.uint8)
        return torch.export.export(detector, (example,), dynamic_shapes=(shapes,) if dynamic else None)


def save(program: ExportedProgram, path: Path, file_format: str, metadata: dict[str, str]) -> None:
    """Write a traced detector and its metadata in a format of SUFFIXES."""
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
        content = io.BytesIO()  # if torch wrote the file itself, a full disk would abort the process
        torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata)})
        with replaced(path) as file:
            file.write(content.getbuffer())
    else:
        configs = {"aot_inductor.metadata": metadata}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def load(path: str | Path) -> tuple[Callable[[Tensor], list[Tensor]], dict[str, str]]:
    """Load a file that `save` wrote: a function from images [B, 3, H, W] uint8 to outputs, and the metadata."""
    if str(path).endswith(SUFFIXES["onnx"]):
        import onnxruntime  # an optional dependency

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        return lambda images: [*map(torch.from_numpy, session.run(None, {"images": images.numpy()}))], metadata
    if str(path).endswith(SUFFIXES["aot_inductor"]):
        package = torch._inductor.aoti_load_package(str(path))
        return lambda images: list(package(images)), package.get_metadata()
    files = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=files).module()
    return lambda images: list(module(images)), json.loads(files["metadata.json"])


def check_image(size: tuple[int, int], photograph: np.ndarray | None, seed: int) -> Tensor:
    """An image to compare networks with, [1, 3, H, W] uint8: a photograph resized, or smooth random colours."""
    if photograph is None:
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(0, 256, (1, 3, 8, 8), generator=generator, dtype=torch.uint8)
    else:
        image = torch.from_numpy(photograph).permute(2, 0, 1)[None]
    return F.interpolate(image, size, mode="bilinear", antialias=photograph is not None)


def count_missing(found: Detections, candidates: Detections, nms_threshold: float, max_detections: int) -> int:
    """The number of candidates that NMS should have kept: those that no equal or better detection overlaps.

    If `max_detections` were found, only candidates better than the last of them count.
    """
    better = found.scores[:, None] >= candidates.scores - SCORE_TOLERANCE  # [N, C]
    better &= found.labels[:, None] == candidates.labels
    overlaps = box_iou(found.boxes, candidates.boxes) >= nms_threshold - IOU_TOLERANCE
    missing = ~(better & overlaps).any(dim=0)
    if len(found.scores) >= max_detections:
        missing &= candidates.scores > found.scores[-1] + SCORE_TOLERANCE
    return int(missing.sum())


def count_wrong(found: Detections, candidates: Detections, nms_threshold: float) -> int:
    """The number of detections that are not a candidate or overlap a better detection."""
    equal = (found.scores[:, None] - candidates.scores).abs() <= SCORE_TOLERANCE  # [N, C]
    equal &= (found.boxes[:, None] - candidates.boxes).abs().amax(dim=2) <= BOX_TOLERANCE
    equal &= found.labels[:, None] == candidates.labels
    overlaps = box_iou(found.boxes, found.boxes).triu(diagonal=1) > nms_threshold + IOU_TOLERANCE  # [N, N]
    overlaps &= found.labels[:, None] == found.labels
    return int((~equal.any(dim=1) | overlaps.any(dim=0)).sum())


@torch.no_grad()
def compare(detector: Detector, exported: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> str:
    """Compare an exported network with the eager one, on images [1, 3, H, W] uint8; returns a line that reports it.

    Two correct lists of detections may differ: of two overlapping boxes whose scores differ by a rounding error,
    either may suppress the other, which is common for scores near 0. So the exported detections need not equal the
    eager ones, but they must be a correct result of NMS on the eager candidates; otherwise it is a UserError.
    """
    net, outputs, size = detector.net, exported(images), tuple(images.shape[-2:])
    logits, deltas, anchors = (values[0] for values in net.heads(normalize(images)))
    report, difference = f"{size[0]} x {size[1]}: ", 0.0
    if not detector.with_nms:
        difference = float((outputs[0] - logits).abs().max() / logits.abs().max())
        report += f"logits within {difference:.1e} relative, "
        outputs = detector.select(outputs[0][0], outputs[1][0], *size)

    def candidates(score_threshold: float, top_k: int) -> Detections:
        chosen = postprocess.best_candidates(logits, net.anchors.level_sizes(*size), score_threshold, top_k)
        return postprocess.select_detections(chosen, logits, deltas, anchors, size, 1.0, max_detections=None)

    # Rounding also decides whether a box near the score threshold or near the end of the top k is a candidate.
    certain = candidates(detector.score_threshold + SCORE_TOLERANCE, detector.top_k // 2)
    possible = candidates(detector.score_threshold - SCORE_TOLERANCE, detector.top_k * 2)
    found = Detections(*outputs)
    missing = count_missing(found, certain, detector.nms_threshold, detector.max_detections)
    wrong = count_wrong(found, possible, detector.nms_threshold)
    report += f"{len(found.scores)} detections, {missing} missing, {wrong} wrong"
    if difference > LOGIT_TOLERANCE or missing or wrong:
        raise UserError(f"the exported network differs from the original at {report}")
    return report


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; a usage error exits with 2."""
    parser = flags.make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="checkpoint, such as best.pt")
    add("--format", choices=sorted(SUFFIXES), default="onnx", help=f"file format {flags.DEFAULT}")
    add("--output", help="file to write (default: beside the checkpoint, with the format's suffix)")
    add("--with_nms", action="store_true", help="return the detections of one image")
    add("--dynamic", action="store_true", help=f"take images of any size from {MIN_DYNAMIC_SIDE} pixels")
    add("--height", type=flags.positive_int, help="pixels, a multiple of 32 (default: the model's short side)")
    add("--width", type=flags.positive_int, help="pixels, a multiple of 32 (default: the model's long side)")
    flags.add_detection_arguments(parser)
    add("--image", help="image to compare the networks on, in place of random colours")
    args = parser.parse_args(argv)
    if args.dynamic and (args.height or args.width):
        parser.error("--dynamic takes images of any size, so it excludes --height and --width")
    return args


@script
def main(argv: list[str] | None = None) -> None:
    """Export as the flags say, and compare with the eager network."""
    args = parse_arguments(argv)
    setup_logging()
    net, info = load_model(args.model)
    detector = Detector(net, args.with_nms, **detection_limits(info, flags.given_limits(args))).eval()
    sides = args.height or info["min_side"], args.width or info["max_side"]
    sizes = CHECK_SIZES if args.dynamic else [tuple(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in sides)] * 2
    if args.dynamic and info["min_side"] < MIN_DYNAMIC_SIDE:
        message = "warning: the model was trained on short sides of %d pixels, but --dynamic takes none below %d"
        log.warning(message, info["min_side"], MIN_DYNAMIC_SIDE)
    path = output_file(args.output or Path(args.model).with_suffix(SUFFIXES[args.format]))
    try:  # before the long export
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--output {path}: nothing can be written to its folder ({error.strerror})") from error
    if not path.name.endswith(SUFFIXES[args.format]):
        raise UserError(f"--output {path}: must end in {SUFFIXES[args.format]}")
    photograph = read_image(args.image, info["pixel_range"]) if args.image else None
    kept = ("class_names", "min_side", "max_side", "tile", "tile_overlap", "pixel_range")
    metadata = {name: json.dumps(info[name]) for name in kept} | {"outputs": json.dumps(OUTPUTS[args.with_nms])}
    metadata["input"] = "images: uint8 RGB, batch x 3 x height x width"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*create_unbacked_symint", FutureWarning)  # of torchvision's NMS
        save(trace(detector, sizes[0], args.dynamic), path, args.format, metadata)
    exported, _ = load(path)
    for seed, size in enumerate(sizes):
        log.info("%s", compare(detector, exported, check_image(size, photograph, seed)))
    log.info("%s: %.1f MB, %d classes", path, path.stat().st_size / 1e6, len(info["class_names"]))
