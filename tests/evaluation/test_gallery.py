import numpy as np
from helpers import detections, exif, gradient, in_memory, save
from PIL import Image

from retinanet.data.dataset import DetectionDataset
from retinanet.evaluation import gallery
from retinanet.evaluation.errors import analyse

BOX, FAR = [0, 0, 10, 10], [30, 30, 44, 44]


def test_the_worst_images_of_each_kind_come_first(monkeypatch):
    monkeypatch.setattr(gallery, "MAX_IMAGES", 5)
    dataset = in_memory([[*BOX, 0]] * 9, range(9), 9)
    found = {image: detections([0.9, 0, *BOX]) for image in range(9)}  # all right
    found[8] = detections([0.9, 0, *BOX], [0.6, 0, *FAR])
    found[3] = detections([0.9, 0, *BOX], [0.8, 0, *FAR])
    found[5] = detections([0.9, 1, *BOX])
    found[7] = detections()
    chosen = gallery.choose_images(dataset, analyse(dataset, found), 0.5)
    assert set(chosen) == {3, 5, 7, 8} and chosen[-1] == 8
    monkeypatch.setattr(gallery, "MAX_BOXES", 3)
    assert len(gallery.choose_images(dataset, analyse(dataset, found), 0.5)) == 1


def test_large_deep_and_turned_images_are_saved_upright_within_the_budget(tmp_path, monkeypatch):
    files = [str(tmp_path / name) for name in ("large.png", "deep.png", "turned.jpg")]
    save(gradient(900, 2600), files[0])
    Image.fromarray(np.full((48, 64), 40_000, dtype=np.uint16)).save(files[1])
    Image.fromarray(gradient(48, 64)).save(files[2], exif=exif(6))
    dataset = DetectionDataset(files, np.array([[*BOX, 0]] * 3, dtype="f4"), np.arange(3), ["a"])
    saved = gallery.save_images(dataset, [2, 0, 1], tmp_path / "report")
    assert saved == [("image_000.jpg", (64, 48)), ("image_001.jpg", (900, 2600)), ("image_002.jpg", (48, 64))]
    with Image.open(tmp_path / "report" / "image_001.jpg") as image:
        assert image.size == (1280, 443) and image.format == "JPEG"
    monkeypatch.setattr(gallery, "MAX_BYTES", 3 * 9000)
    gallery.save_images(dataset, [2, 0, 1], tmp_path / "report")
    assert max(path.stat().st_size for path in (tmp_path / "report").iterdir()) <= 9000


def test_an_image_is_described_by_its_boxes():
    dataset = in_memory([[*BOX, 1], [*FAR, 0]], [0, 0], difficult=[False, True])
    found = {0: detections([0.9, 1, 1, 0, 11, 10], [0.2, 0, 50, 0, 60.04, 10])}
    one = analyse(dataset, found).images[0]
    entry = gallery.image_entry(dataset, 0, one, ("a.jpg", (48, 64)), np.array([0.1, 0.5, 0.9]))
    right = {"corners": [1, 0, 11, 10], "label": 1, "score": 0.9, "kind": "right", "target": 0, "took": 0, "level": 2}
    assert entry["found"][0] == right
    assert entry["found"][1]["corners"] == [50, 0, 60, 10] and entry["found"][1]["kind"] == "background"
    assert (entry["found"][1]["took"], entry["found"][1]["level"]) == (-2, 1)
    assert [(box["corners"], box["label"], box["iou"]) for box in entry["truth"]] == [(BOX, 1, 0.818)]
    assert entry["ignored"] == [FAR] and entry["size"] == [48, 64] and entry["file"] == "a.jpg"
