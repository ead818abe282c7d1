"""Loading a COCO-sized set of annotations: our readers beside pycocotools, and the memory of worker processes."""

import contextlib
import csv
import functools
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from side_by_side import make_parser, measure, parse, report, timed
from torch.utils.data import DataLoader

from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset


def write_files(folder: Path, images: int, boxes: int, classes: int = 80) -> None:
    """Write a random data set in COCO's layout, without image files, and the same data as CSV files."""
    rng = np.random.default_rng(0)
    image_ids = np.sort(rng.choice(10 * images, images, replace=False)).tolist()
    owner = rng.integers(0, images, boxes).tolist()
    corner, size = rng.uniform(0, 300, (boxes, 2)).round(2), rng.uniform(5, 300, (boxes, 2)).round(2)
    xywh = np.concatenate([corner, size], axis=1).tolist()
    labels = rng.integers(0, classes, boxes).tolist()
    segmentation = [rng.uniform(0, 600, 40).round(2).tolist()]
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in image_ids],
        "categories": [{"id": label + 1, "name": f"class{label}"} for label in range(classes)],
        "annotations": [
            {"id": number, "image_id": image_ids[o], "category_id": label + 1, "bbox": box, "area": box[2] * box[3]}
            | {"iscrowd": 0, "segmentation": segmentation}
            for number, (o, box, label) in enumerate(zip(owner, xywh, labels, strict=True), start=1)
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_set.json").write_text(json.dumps(content))
    with open(folder / "boxes.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [f"{image_ids[o]:012d}.jpg", x, y, x + w, y + h, f"class{label}"]
            for o, (x, y, w, h), label in zip(owner, xywh, labels, strict=True)
        )
    (folder / "classes.csv").write_text("".join(f"class{label},{label}\n" for label in range(classes)))


def count_boxes(dataset: CocoDataset, indices: list[int]) -> int:
    """Load the annotations of some images, without the images."""
    return sum(len(dataset.load_annotations(index)) for index in indices)


def private_memory(pid: int) -> float:
    """Proportional set size of a process, MiB: a page that n processes share counts as 1 / n for each."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def memory_of_workers(dataset: CocoDataset, workers: int) -> float:
    """Memory of this process and its workers near the end of an epoch, as a multiple of this process alone."""
    alone = private_memory(os.getpid())
    load = functools.partial(count_boxes, dataset)
    loader = DataLoader(range(len(dataset)), 64, num_workers=workers, collate_fn=load, persistent_workers=True)
    iterator = iter(loader)
    for _ in range(len(loader) - 2 * workers):
        next(iterator)
    pids = [os.getpid(), *(worker.pid for worker in iterator._workers)]
    return sum(map(private_memory, pids)) / alone


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--images", type=int, default=118_000, help="images")
    parser.add_argument("--boxes", type=int, default=860_000, help="boxes")
    args = parse(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = timed(lambda: write_files(folder, args.images, args.boxes))

        def pycocotools() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                COCO(folder / "annotations" / "instances_set.json")

        programs = {
            "ours, json": lambda: CocoDataset(folder, "set"),
            "pycocotools, json": pycocotools,
            "ours, CSV": lambda: CSVDataset(folder / "boxes.csv", folder / "classes.csv"),
        }
        seconds = measure(programs, args.repeats)
        extra = {"4 workers' memory / one process": memory_of_workers(CocoDataset(folder, "set"), 4)}
    title = f"{args.images} images, {args.boxes} boxes (files written in {written:.0f} s)"
    report(title, seconds, {("ours, json", "pycocotools, json"): 1.0}, args.json, **extra)


if __name__ == "__main__":
    main()
