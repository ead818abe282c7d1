"""Small data sets, on disk and in memory, and detections."""

import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import _utils

from retinanet.data.dataset import DetectionDataset
from retinanet.postprocess import Detections

# Seconds that torch waits for a data-loading worker to end after an error; the default is 5.
_utils.MP_STATUS_CHECK_INTERVAL = 0.2

CLASSES = ["circle", "rectangle", "triangle"]


def gradient(height, width):
    """A smooth RGB image in which no two sides, corners or channels look alike."""
    ys, xs = np.mgrid[:height, :width]
    red, green = 40 + 180 * xs / width, 200 - 150 * ys / height
    return np.stack([red, green, (red + green) / 3], axis=2).astype(np.uint8)


def save(array, path, **options):
    """Write an image; returns its path as text."""
    Image.fromarray(array).save(path, **options)
    return str(path)


def exif(orientation):
    """EXIF tags that hold only an orientation."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def frame_image(number, height=40, width=64, noise=0):
    """Green, with a white square that moves by two pixels per frame, and noise that makes the file larger."""
    image = np.random.default_rng(number).integers(0, noise + 1, (height, width, 3), dtype=np.uint8)
    image[:, :, 1], image[8:16, 2 * number : 2 * number + 8] = 160, 255
    return image


def write_clip(
    path, ticks=range(12), time_base=Fraction(1, 25), size=(40, 64), codec="libx264", rotation=0, noise=0, **options
):
    """A clip with a frame at each of the `ticks`."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(frame_image(number, *size, noise), format="rgb24")
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def truncate(path, share=0.5):
    """Truncate a file."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * share)])


def broken_pipe():
    """A text file that writes to a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


class Ratios:
    """A data set that knows only the shapes of its images."""

    def __init__(self, ratios):
        self.ratios = ratios

    def __len__(self):
        return len(self.ratios)

    def image_aspect_ratio(self, index):
        return self.ratios[index]


def write_csv_data(folder, lines=None):
    """Two images, `a.png` (48 high, 64 wide, two boxes) and `b.png` (64 x 48, none), and their CSV files.

    Returns the paths of `data.csv` and `classes.csv`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(gradient(48, 64), folder / "a.png")
    save(gradient(64, 48), folder / "b.png")
    if lines is None:
        lines = ["a.png,4,8,24,40,rectangle", "a.png,30,10,60,40,circle", "b.png,,,,,"]
    (folder / "data.csv").write_text("".join(f"{line}\n" for line in lines))
    (folder / "classes.csv").write_text("".join(f"{name},{label}\n" for label, name in enumerate(CLASSES)))
    return str(folder / "data.csv"), str(folder / "classes.csv")


def coco_content():
    """A COCO annotation file: three images, not in the order of their ids, and classes whose ids have gaps."""
    return {
        "images": [
            {"id": 42, "file_name": "b.png", "height": 64, "width": 48},
            {"id": 7, "file_name": "a.png", "height": 48, "width": 64},
            {"id": 99, "file_name": "empty.png", "height": 48, "width": 48},
        ],
        "categories": [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 42, "category_id": 17, "bbox": [5, 6, 20, 30], "area": 600, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 17, "bbox": [10, 10, 8, 9.5], "area": 76, "iscrowd": 0},
            {"id": 4, "image_id": 7, "category_id": 17, "bbox": [0, 0, 64, 48], "area": 3072, "iscrowd": 1},
        ],
    }


def write_coco_data(folder, content=None, set_name="val2017", folder_name="images"):
    """The images and the annotation file of `coco_content`, in COCO's layout; returns the root folder."""
    images = folder / folder_name / set_name
    images.mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for name, size in (("a.png", (48, 64)), ("b.png", (64, 48)), ("empty.png", (48, 48))):
        save(gradient(*size), images / name)
    content = coco_content() if content is None else content
    (folder / "annotations" / f"instances_{set_name}.json").write_text(json.dumps(content))
    return str(folder)


def detections(*rows):
    """Detections of one image, from rows of score, label, x1, y1, x2, y2."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, 0], table[:, 1].long(), table[:, 2:])


def in_memory(annotations, image_index=None, num_images=1, class_names=("a", "b"), difficult=None):
    """A data set without images: annotations [N, 5], by default all of image 0."""
    annotations = np.array(annotations, dtype=np.float32).reshape(-1, 5)
    image_index = np.zeros(len(annotations), dtype=int) if image_index is None else np.array(image_index, dtype=int)
    names = [f"{index}.png" for index in range(num_images)]
    return DetectionDataset(names, annotations, image_index, list(class_names), difficult=difficult)
