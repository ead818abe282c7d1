"""Tiles, from images to detections; `python -m pytest -m slow -s tests/test_large_images.py` shows their benefit."""

import contextlib
import csv
import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
import torch
from helpers import gradient, in_memory, save
from PIL import Image
from torch import nn

import retinanet
import train
import validate
import visualize
from retinanet.data import loader
from retinanet.data.csv import CSVDataset
from retinanet.data.loader import make_loader
from retinanet.data.tiles import Tiling
from retinanet.data.transforms import Resizer, UnNormalizer
from retinanet.detection import detect, detect_images
from retinanet.evaluation.errors import greedy_match
from retinanet.evaluation.voc import compute_overlap
from retinanet.inference import predict
from retinanet.postprocess import Detections
from retinanet.training import checkpoint

NAMES = ["disc", "square"]
SIDES = {"min_side": 64, "max_side": 96}


class Finder(nn.Module):
    """A perfect detector: an object's pixels have one value of red, which gives its score; the ground has no red."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.num_classes, self.batches = 2, []

    def detect(self, images, image_sizes, max_detections=None, **_):
        self.batches.append(tuple(images.shape))
        return [self._find(image, *size, max_detections) for image, size in zip(images, image_sizes, strict=True)]

    def _find(self, image, height, width, limit):
        red = (UnNormalizer()(image)[0, :height, :width] * 255).round().int()
        rows = []
        for value in sorted(set(red.unique().tolist()) - {0}, reverse=True):
            ys, xs = (red == value).nonzero().unbind(dim=1)
            rows.append((value / 256, value % 2, xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        table = torch.tensor(rows).reshape(-1, 6)[:limit]
        return Detections(table[:, 0], table[:, 1].long(), table[:, 2:].float())


def scene(height, width, number, largest, seed=0):
    """An image for Finder, of rectangles that touch but do not overlap, and the expected detections, best first."""
    rng, image, rows = np.random.default_rng(seed), np.zeros((height, width, 3), dtype=np.uint8), []
    while len(rows) < number:
        size = rng.integers(4, largest, 2)
        x, y = rng.integers(0, (width, height) - size)
        place = image[y : y + size[1], x : x + size[0], 0]
        if not place.any():
            value = 255 - len(rows)
            place[:] = value
            rows.append((value / 256, value % 2, x, y, x + size[0], y + size[1]))
    return image, torch.tensor(np.array(rows), dtype=torch.float32)


def table(found):
    return torch.cat([found.scores[:, None], found.labels[:, None].float(), found.boxes], dim=1)


@pytest.mark.parametrize(("tile", "overlap"), [(100, 0.25), (64, 0.5), (160, 0.1)])
def test_every_object_is_found_once_in_files_arrays_and_data_sets(tile, overlap):
    image, expected = scene(170, 210, 20, 80)
    small, expected_small = scene(60, 64, 3, 20, seed=1)
    tiling, net = Tiling(tile, overlap), Finder()
    resizer = Resizer(60, 64)  # scale 1
    found = [
        one for _, one in detect_images(net, [small, image, image], resizer, 4, tiling=tiling, max_detections=None)
    ]
    assert torch.equal(table(found[0]), expected_small)
    assert torch.equal(table(found[1]), expected) and torch.equal(table(found[2]), expected)
    assert max(shape[0] for shape in net.batches) == 4
    data = in_memory(np.zeros((0, 5)), num_images=3)
    images = [image, small, image]
    data.in_files, data.known_sizes = False, np.array([one.shape[:2] for one in images])
    data.load_image, data.transform = (lambda index: images[index]), resizer
    by_index = detect(net, make_loader(data, 4, tiling=tiling), torch.device("cpu"), max_detections=None)
    for index, one in enumerate((expected, expected_small, expected)):
        assert torch.equal(table(by_index[index]), one)
    limited = next(detect_images(net, [image], resizer, 4, tiling=tiling, max_detections=7))[1]
    assert torch.equal(table(limited), expected[:7])  # of the whole image


def test_under_torchrun_each_process_takes_its_share(monkeypatch):
    data = in_memory(np.zeros((0, 5)), num_images=5)
    sizes = [(50, 50), (300, 300), (200, 90), (40, 40), (90, 200)]
    data.in_files, data.known_sizes = False, np.array(sizes)
    data.load_image, data.transform = (lambda index: gradient(*sizes[index])), Resizer(64, 64)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(loader, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(loader, "get_world_size", lambda: 2)
        shares.append({index for batch in make_loader(data, 1, tiling=Tiling(100)) for index in batch["index"]})
    assert shares[0] | shares[1] == set(range(5)) and not shares[0] & shares[1] and min(map(len, shares)) == 2


def assert_equal(one, other):
    assert len(one.scores) > 0
    assert all(torch.equal(left, right) for left, right in zip(one[:3], other[:3], strict=True))


def test_a_tile_of_the_images_own_size_gives_exactly_the_detections_without_tiles(filled_net):
    images = [gradient(64, 90), gradient(64, 90)[::-1].copy(), gradient(96, 96), gradient(30, 40)]
    options = {"score_threshold": 0.05, "max_detections": 20}
    whole = predict(filled_net, images, **options, **SIDES)
    for one, other in zip(whole, predict(filled_net, images, tile=96, **options, **SIDES), strict=True):
        assert_equal(one, other)
    # Tiles, too, see what an image of their size sees at scale 1.
    large = gradient(96, 180)
    found = predict(filled_net, large, tile=96, tile_overlap=0, score_threshold=0.02, max_detections=None, **SIDES)[0]
    parts = [predict(filled_net, large[:, x : x + 96], 0.02, None, min_side=96, max_side=96)[0] for x in (0, 84)]
    assert 0 < len(found.scores) <= sum(len(part.scores) for part in parts)
    assert float(found.scores[0]) == pytest.approx(max(float(part.scores[0]) for part in parts))
    assert found.boxes[:, 2].max() > 96


def test_the_smallest_tile_works(filled_net):
    found = predict(filled_net, gradient(16, 28), tile=16, score_threshold=0.01, max_detections=None)[0]
    assert len(found.scores) and found.boxes[:, 2].max() <= 28 and found.boxes[:, 3].max() <= 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 15}, "tile must be a whole number"),
        ({"tile": "512"}, "tile must be a whole number"),
        ({"tile": -1}, "tile must be a whole number"),
        ({"tile": 64, "tile_overlap": 1}, "tile_overlap must be a share"),
        ({"tile": 64, "tile_overlap": None}, "tile_overlap must be a share"),
        ({"tile": None, "tile_overlap": 0.5}, "needs a side of the tiles"),
    ],
)
def test_wrong_tiles_are_errors(filled_net, options, message):
    with pytest.raises(ValueError, match=message):
        predict(filled_net, gradient(20, 40), **options)


def run(script, *flags):
    """Exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main([str(flag) for flag in flags])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_a_model_keeps_its_tiles_from_training_to_use(tmp_path):
    for name in "ab":
        save(gradient(200, 300), tmp_path / f"{name}.png")
    (tmp_path / "data.csv").write_text("a.png,20,30,80,70,disc\nb.png,200,110,260,190,disc\n")
    (tmp_path / "classes.csv").write_text("disc,0\n")
    data = ["--dataset", "csv", "--csv_val", tmp_path / "data.csv", "--csv_classes", tmp_path / "classes.csv"]
    machine = ["--device", "cpu", "--precision", "fp32", "--workers", 0]
    flags = [*data, *machine, "--csv_train", tmp_path / "data.csv", "--depth", 18, "--weights", "none"]
    flags += ["--batch_size", 2, "--tile", 128, "--tile_overlap", 0.3, "--out_dir", tmp_path / "run"]
    flags += ["--score_threshold", 0.005, "--max_detections", 30]
    assert run(train, *flags, "--epochs", 1)[0] == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "step" in entry][-1] == 6  # 12 tiles of 128 px cover the two images
    net, info = checkpoint.load_model(tmp_path / "run" / "best.pt")
    assert [info[key] for key in ("tile", "tile_overlap", "min_side", "max_side")] == [128, 0.3, 128, 128]
    given = ["--tile", 128, "--tile_overlap", 0.3]
    tables = []
    for number, tiles in enumerate(([], given, ["--tile", 0])):
        path = tmp_path / f"{number}.csv"
        status, _, err = run(
            validate, *data, *machine, "--model", tmp_path / "run" / "best.pt", *tiles, "--save_csv", path
        )
        assert (status, err) == (0, "")
        tables.append(path.read_text())
    assert tables[0] == tables[1] != tables[2] and len(tables[0].splitlines()) > 1
    image = gradient(200, 300)
    found = predict((net, info), image, 0.005)[0]
    assert_equal(found, predict((net, info), image, 0.005, tile=128, tile_overlap=0.3)[0])
    small = gradient(60, 50)  # not enlarged either, because training enlarged nothing
    assert_equal(predict((net, info), small, 0.005)[0], predict(net, small, 0.005, 30, min_side=50, max_side=60)[0])
    status, _, err = run(train, *flags[:-2], "--epochs", 2, "--resume", "auto", "--tile", 96)
    assert status == 1 and "--tile is 96, was 128" in err


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (train, ["--tile", 512, "--min_side", 800], "--tile uses images at full resolution, so it excludes --min_side"),
        (train, ["--tile_background", 0.5], "--tile_background needs --tile"),
        (train, ["--tile_overlap", 0.95, "--tile", 64], "--tile_overlap must be from 0 to 0.9"),
        (train, ["--tile", 8], "--tile must be from 16 to 16,384"),
        (train, ["--tile", 0], "at least 1"),
        (validate, ["--detections", "x.json", "--tile", 512], "--detections scores the file as it is, without --tile"),
        (visualize, ["--show", "anchors", "--tile", 512], "not --show anchors"),
        (visualize, ["--show", "truth", "--save_csv", "x.csv"], "--save_csv is for --show detections"),
    ],
)
def test_contradictions_are_usage_errors(script, flags, message):
    status, _, err = run(script, "--dataset", "shapes", *flags)
    assert status == 2 and message in err


def draw(height, width, count, seed):
    """An aerial view: discs and squares of 12 to 40 px, apart from each other, on a cloudy ground; and their boxes."""
    rng = np.random.default_rng(seed)
    clouds = rng.integers(90, 160, (height // 100 + 2, width // 100 + 2, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    image = (image + rng.integers(-12, 13, (height, width, 1), dtype=np.int16)).clip(0, 255).astype(np.uint8)
    boxes, taken = [], np.zeros((height, width), dtype=bool)
    while len(boxes) < count:
        side, label = int(rng.integers(12, 41)), int(rng.integers(2))
        x, y = (int(rng.integers(0, length - side)) for length in (width, height))
        place = slice(y, y + side), slice(x, x + side)
        if taken[place].any():
            continue
        taken[place] = True
        colour = rng.integers(0, 80, 3) if rng.random() < 0.5 else rng.integers(180, 256, 3)
        ys, xs = np.mgrid[:side, :side] + 0.5 - side / 2
        image[place][(ys**2 + xs**2 <= side**2 / 4) | (label == 1)] = colour
        boxes.append((x, y, x + side, y + side, label))
    return image, np.array(boxes)


def write(folder, name, number, *size_and_count, seed):
    """Images and their CSV files, as a data set."""
    with open(folder / f"{name}.csv", "w", newline="") as file:
        for index in range(number):
            image, boxes = draw(*size_and_count, [seed, index])
            save(image, folder / f"{name}{index}.png", compress_level=1)
            csv.writer(file).writerows((f"{name}{index}.png", *box[:4], NAMES[box[4]]) for box in boxes.tolist())
    (folder / "classes.csv").write_text("disc,0\nsquare,1\n")
    return CSVDataset(folder / f"{name}.csv", folder / "classes.csv")


def recall_and_precision(found, boxes):
    iou = compute_overlap(found.boxes, boxes[:, :4].astype(np.float32))
    iou[found.labels.numpy()[:, None] != boxes[:, 4]] = 0
    right = (greedy_match(iou, 0.5) >= 0).sum()
    return right / len(boxes), right / max(1, len(found.scores))


@pytest.mark.slow
def test_a_detector_trained_on_tiles_finds_small_objects_in_a_large_image(tmp_path):
    train_set = write(tmp_path, "train", 12, 1024, 1024, 120, seed=1)
    val_set = write(tmp_path, "val", 2, 1024, 1024, 80, seed=2)
    settings = {"depth": 18, "weights": "none", "recipe": "scratch", "anchor_scales": [0.4, 0.63, 1], "workers": 0}
    settings |= {"tile": 512, "max_detections": 1000, "batch_size": 2, "epochs": 12, "val_every": 12}
    result = retinanet.train(train_set, val_set, out_dir=tmp_path / "run", **settings)
    image, boxes = draw(4000, 6000, 400, 3)
    options = {"precision": "auto", "score_threshold": "best"}
    tiled = recall_and_precision(retinanet.predict(result.best, image, tile=512, **options)[0], boxes)
    whole = recall_and_precision(
        retinanet.predict(result.best, image, tile=None, min_side=608, max_side=1024, **options)[0], boxes
    )
    print(f"\nrecall and precision with tiles: {tiled}, without: {whole}")  # noqa: T201, for the README
    assert tiled[0] >= 0.9 and tiled[1] >= 0.9
    assert whole[0] < 0.05


HUGE = """
import resource, sys
import torch
import visualize
from retinanet.model import RetinaNet
from retinanet.postprocess import Detections

detect, calls = RetinaNet.detect, []


def only_the_first(self, images, **limits):
    calls.append(1)
    found = Detections(torch.ones(1), torch.zeros(1).long(), torch.tensor([[200.0, 200, 240, 240]]))
    return detect(self, images, **limits) if len(calls) == 1 else [found] * len(images)


RetinaNet.detect = only_the_first
status = visualize.main(sys.argv[1:])
sys.exit(status or f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}")
"""


def write_tiff(path, side):
    bands = (np.full((16, side, 3), row % 250, dtype=np.uint8) for row in range(side // 16))
    tifffile.imwrite(path, bands, shape=(side, side, 3), dtype=np.uint8, rowsperstrip=16, photometric="rgb")


def write_png(path, side):
    """As Pillow would write it, but without the whole image in memory."""
    compress = zlib.compressobj(1)
    rows = b"".join(compress.compress(b"\0" + bytes([row % 250]) * 3 * side) for row in range(side)) + compress.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "write_file"), [("a.tif", write_tiff), ("a.png", write_png)])
def test_an_image_of_400_million_pixels_takes_at_most_4_gib(tmp_path, name, write_file):
    """The network runs on the first batch only; the others would take no more memory.

    The TIFF file is mapped: the parts that were read count here, although the system can reclaim them.
    """
    checkpoint.save(tmp_path / "model.pt", checkpoint.model_entries(retinanet.model.resnet50(2), NAMES, 608, 1024))
    write_file(tmp_path / name, 20_000)
    flags = ["--images", tmp_path / name, "--model", tmp_path / "model.pt", "--tile", 512, "--pixel_limit", 400]
    flags += ["--max_detections", 10_000, "--out_dir", tmp_path / "found", "--save_csv", tmp_path / "found.csv"]
    done = subprocess.run([sys.executable, "-c", HUGE, *map(str, flags)], capture_output=True, text=True)
    peak = float(done.stderr.split()[-1])
    print(f"\n{name}: {peak} GiB")  # noqa: T201, for the README
    assert peak < 4
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 1 + 52 * 52 - 4  # tiles
