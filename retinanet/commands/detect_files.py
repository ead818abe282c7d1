"""`visualize.py --images`: detections on images and videos without annotations."""

import argparse
import collections
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet import detection, inference, process
from retinanet.commands import flags
from retinanet.data.files import find_images
from retinanet.data.images import open_image, read_image
from retinanet.data.report import counted
from retinanet.data.tiles import overview
from retinanet.data.video import Frame, Video, is_video, video_writer
from retinanet.errors import UserError, output_file
from retinanet.model import RetinaNet
from retinanet.postprocess import Detections
from retinanet.process import log, progress
from retinanet.results import check_csv, write_csv
from retinanet.training.files import make_out_dir
from retinanet.visual.drawing import draw_boxes, legible_zoom, save_image
from retinanet.visual.text import readable_names

DRAWN_SIDE = 8192  # pixels: larger images are reduced to this before they are drawn


def output_paths(files: Sequence[Path], folder: Path) -> list[Path]:
    """Paths of the drawn files: below `folder`, as the files lie below their common folder; each path is unique."""
    common = Path(os.path.commonpath([file.absolute().parent for file in files]))
    outputs: dict[Path, None] = {}
    for file in files:
        relative, suffix = file.absolute().relative_to(common), ".mp4" if is_video(file) else ".png"
        path, number = folder / relative.with_suffix(suffix), 2
        while path in outputs:
            path = folder / relative.with_name(f"{relative.stem}_{number}{suffix}")
            number += 1
        outputs[path] = None
    mixed = {path.resolve().parent for path in outputs} & {file.resolve().parent for file in files}
    if mixed:  # the next run on that folder would take drawn files for new ones
        raise UserError(f"--out_dir {folder}: drawn files would be mixed with inputs in {min(mixed)}; choose another")
    return list(outputs)


@contextlib.contextmanager
def detections_json(
    path: Path, head: dict[str, Any], failures: list[str]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write detections.json with one line per entry: the context gives a function to call with each of them.

    So memory does not grow with the length of a video, and the file is valid even if the program is interrupted.
    """
    with open(output_file(path), "w") as file:
        separators = itertools.chain(["\n"], itertools.repeat(",\n"))
        file.write(f'{json.dumps(head)[:-1]}, "images": [')
        try:
            yield lambda entry: file.write(next(separators) + json.dumps(entry))
        finally:
            file.write(f'\n], "unreadable": {json.dumps(failures)}}}\n')


def draw_frame(image: np.ndarray, found: Detections, names: Sequence[str], of_video: bool) -> np.ndarray:
    """Draw the detections of an image or a frame; frames get no legend, because all must have the same size."""
    scores, labels, boxes = (values.numpy() for values in found)
    drawn_names = readable_names(names)
    captions = [f"{drawn_names[label]} {score:.2f}" for score, label in zip(scores, labels, strict=True)]
    if of_video:
        return draw_boxes(image, boxes, labels, captions, zoom=legible_zoom(image.shape[:2], []))
    return draw_boxes(image, boxes, labels, captions, class_names=names)


def describe(frame: Frame, found: Detections, names: Sequence[str], of_video: bool) -> dict[str, Any]:
    """The entry of an image or a frame in detections.json; boxes are xyxy, in its pixels."""
    entry = dict(zip(("height", "width"), frame.image.shape, strict=False))
    if of_video:
        entry |= {"frame": frame.number, "seconds": round(float(frame.seconds), 6)}
    rows = zip(*(values.tolist() for values in found), strict=True)
    detections = [{"class": names[label], "label": label, "score": score, "box": box} for score, label, box in rows]
    return entry | {"detections": detections}


def detect_in_files(
    files: Sequence[Path],
    args: argparse.Namespace,
    by_parts: bool,
    detect: Callable[[Iterator[np.ndarray]], Iterator[tuple[np.ndarray, Detections]]],
    failures: list[str],
) -> Iterator[tuple[Path, Video | None, Frame, Detections]]:
    """Every image and frame with what `detect` finds in it, in order; messages about bad files go to `failures`."""
    waiting = collections.deque()  # file, video or None, and frame, until their detections come

    def pixels() -> Iterator[np.ndarray]:
        read = open_image if by_parts else read_image
        for path in progress(files, "detecting"):
            try:
                video = Video(path, args.every) if is_video(path) else None
                frames = video or [Frame(read(path, args.pixel_range, args.pixel_limit), 0, 0)]
                for frame in progress(frames, path.name, video.total) if video else frames:
                    waiting.append((path, video, frame))
                    yield frame.image
            except UserError as error:
                failures.append(str(error))

    images = pixels()
    while True:
        try:
            for _, found in detect(images):
                yield *waiting.popleft(), found
            return
        except UserError as error:  # a part of a large image cannot be read; the next image may be intact
            failures.append(str(error))
            waiting.clear()


def detect_files(args: argparse.Namespace, net: RetinaNet, info: dict[str, Any], device: torch.device) -> None:
    """Detect objects in the images and videos of `--images`, draw each, and write all detections to detections.json.

    Files that cannot be read are listed in a UserError at the end.
    """
    files, folder = find_images(args.images), make_out_dir(args.out_dir)
    targets = dict(zip(files, output_paths(files, folder), strict=True))
    if args.save_csv:
        check_csv(args.save_csv)
    tiling = inference.choose_tiling(info, flags.given_tiles(args))
    precision = process.choose_precision(args.precision, device)
    resizer = inference.make_resizer(info, args.min_side, args.max_side)
    limits = inference.detection_limits(info, flags.given_limits(args), for_use=True)
    names, limit, counts = info["class_names"], limits["max_detections"], collections.Counter()
    table: list[tuple[str, Detections]] = []
    failures: list[str] = []

    def detect(images: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, Detections]]:
        return detection.detect_images(net, images, resizer, args.batch_size, precision, tiling, **limits)

    results = detect_in_files(files, args, bool(tiling), detect, failures)
    head = {"model": args.model, "class_names": names, **limits}
    with detections_json(folder / "detections.json", head, failures) as add_entry:
        for (path, video), of_file in itertools.groupby(results, key=lambda result: result[:2]):
            target = targets[path]
            target.parent.mkdir(parents=True, exist_ok=True)
            with video_writer(target, video) if video else contextlib.nullcontext() as write:
                for _, _, frame, found in of_file:
                    image, scale = overview(frame.image, DRAWN_SIDE)
                    picture = draw_frame(image, found._replace(boxes=found.boxes * scale), names, bool(video))
                    if video:
                        write(picture, frame.seconds)
                    else:
                        save_image(picture, target)
                    source = {"file": str(path), "picture": str(target)}
                    add_entry(source | describe(frame, found, names, bool(video)))
                    if args.save_csv:
                        table.append((f"{path}#{frame.number}" if video else str(path), found))
                    number = len(found.scores)
                    counts.update(image=not video, frame=bool(video), detection=number, full=number == limit)
            counts["video"] += bool(video)
    kinds = [kind for kind in ("image", "video", "frame") if counts[kind]] or ["image"]
    log.info("%s: %s", ", ".join(counted(counts[kind], kind) for kind in [*kinds, "detection"]), folder)
    if args.save_csv:
        write_csv(args.save_csv, table, names)
    if counts["full"]:
        text = "warning: %s with %d detections, as many as --max_detections allows: there may be more objects"
        log.warning(text, counted(counts["full"], "image"), limit)
    if failures:
        raise UserError(f"{len(failures)} of {counted(len(files), 'file')} skipped:\n" + "\n".join(failures))
