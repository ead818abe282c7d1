import json
import logging

import numpy as np
import pytest
from helpers import exif
from PIL import Image

import train
from retinanet.commands import check, convert
from retinanet.data import checks, dataset, placing
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.placing import find_placement, move
from retinanet.data.report import DataError, Report
from retinanet.errors import UserError
from retinanet.process import log

WIDTH, HEIGHT = 120, 80
BOX = (10, 20, 50, 30)  # of a white rectangle in the image as annotated


def draw(path, orientation=1, factor=1, size=(HEIGHT, WIDTH), box=BOX, kind="PNG"):
    """Save the annotated image, scaled by a factor, with an EXIF orientation."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    image = Image.fromarray(pixels).resize((round(size[1] * factor), round(size[0] * factor)), Image.Resampling.NEAREST)
    image.save(path, kind, exif=exif(orientation))


def write_coco(root, entries, boxes=(BOX,)):
    """Write the annotation file of images with sizes (width, height), each with boxes x1, y1, x2, y2."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    images = [{"id": n + 1, "file_name": f"{n}.png", "width": w, "height": h} for n, (w, h) in enumerate(entries)]
    annotations = [
        {"id": 10 * n + k, "image_id": n + 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        for n in range(len(entries))
        for k, (x1, y1, x2, y2) in enumerate(boxes, start=1)
    ]
    content = {"categories": [{"id": 1, "name": "thing"}], "images": images, "annotations": annotations}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))


def white_box(image):
    ys, xs = (image[..., 0] > 127).nonzero()
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def assert_boxes_fit(data):
    """Check that samples, annotations and COCO's ground truth have their boxes where the white rectangle is."""
    for index in range(len(data)):
        sample, box = data[index], white_box(data[index]["img"])
        assert sample["annot"][0, :4].tolist() == box == data.load_annotations(index)[0, :4].tolist()
        entry = data.coco.imgToAnns[data.image_ids[index]][0]
        x, y, width, height = entry["bbox"]
        assert [x, y, x + width, y + height] == box and entry["area"] == width * height


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_boxes_of_all_orientations_are_turned_as_the_image_is(tmp_path, kind):
    for orientation in range(1, 9):
        (tmp_path / "train").mkdir(exist_ok=True)
        draw(tmp_path / "train" / f"{orientation - 1}.png", orientation, kind=kind)
    write_coco(tmp_path, [(WIDTH, HEIGHT)] * 8)
    data = CocoDataset(tmp_path, "train")
    assert_boxes_fit(data)
    assert data.report.counts == {"turned boxes": 7} and data.image_sizes[5].tolist() == [WIDTH, HEIGHT]
    assert "(7 times; this is the first)" in data.report.text(["turned boxes"])
    assert checks.check_dataset(data, "headers").counts == {"turned boxes": 7}  # not turned again


def test_boxes_stay_if_the_upright_size_is_declared(tmp_path):
    (tmp_path / "train").mkdir()
    for index, orientation in enumerate((6, 8, 3)):
        draw(tmp_path / "train" / f"{index}.png", orientation)
    write_coco(tmp_path, [(HEIGHT, WIDTH), (HEIGHT, WIDTH), (WIDTH, HEIGHT)])
    data = CocoDataset(tmp_path, "train")
    assert data.load_annotations(0)[0, :4].tolist() == list(BOX) == data.load_annotations(2)[0, :4].tolist()
    assert data.report.counts == {"EXIF rotation": 1}  # orientation 3 does not show in the size


@pytest.mark.parametrize(("orientation", "factor"), [(1, 0.5), (1, 2), (8, 0.5)])
def test_the_boxes_of_resized_images_are_scaled(tmp_path, orientation, factor):
    (tmp_path / "train").mkdir()
    draw(tmp_path / "train" / "0.png", orientation, factor)
    write_coco(tmp_path, [(WIDTH, HEIGHT)])
    data = CocoDataset(tmp_path, "train")
    assert_boxes_fit(data)
    assert data.report.counts == {"scaled boxes" if orientation == 1 else "turned boxes": 1}


def placed(declared, sizes, boxes, orientations=None):
    """The placement of images with one box each: the images of each kind, and the moved boxes."""
    orientations = np.ones(len(sizes), int) if orientations is None else np.array(orientations)
    index = np.arange(len(boxes))
    affine, found = find_placement(np.array(declared), np.array(sizes), orientations, np.array(boxes, float), index)
    return found, move(np.array(boxes, float), affine).tolist()


def test_boxes_that_fit_only_the_file_outweigh_the_declared_size():
    # The tool declared the size of the file, but drew on the upright image: one box shows this for both images.
    found, boxes = placed([[80, 120]] * 2, [[120, 80]] * 2, [[5, 90, 30, 118], [5, 5, 30, 30]], [6, 6])
    assert (
        not found["turned boxes"].any() and found["declared size"].all() and boxes == [[5, 90, 30, 118], [5, 5, 30, 30]]
    )
    found, boxes = placed([[80, 120]] * 2, [[120, 80]] * 2, [[90, 5, 118, 30], [5, 5, 30, 30]], [6, 6])
    assert found["turned boxes"].all() and boxes == [[50, 90, 75, 118], [50, 5, 75, 30]]
    found, boxes = placed([[10, 10]], [[100, 100]], [[5, 5, 90, 90]])  # a size that was made up
    assert not found["scaled boxes"].any() and found["declared size"].all() and boxes == [[5, 5, 90, 90]]


def test_a_difference_of_one_pixel_is_rounding():
    found, boxes = placed([[100, 201], [333, 500]], [[100, 200], [166, 250]], [[0, 0, 200, 100], [100, 100, 500, 300]])
    assert found["scaled boxes"].tolist() == [False, True] and found["declared size"].tolist() == [True, False]
    np.testing.assert_allclose(boxes[1], [50, 100 * 166 / 333, 250, 300 * 166 / 333])


def test_boxes_that_fit_only_another_shape_are_fatal(tmp_path):
    (tmp_path / "train").mkdir()
    draw(tmp_path / "train" / "0.png", size=(60, 60), box=(1, 1, 9, 9))
    write_coco(tmp_path, [(WIDTH, HEIGHT)], [(10, 20, 110, 70)])
    with pytest.raises(DataError, match="image 1: is declared as 120 x 80, and has 60 x 60 pixels in its file"):
        CocoDataset(tmp_path, "train")
    data = CocoDataset(tmp_path, "train", report=Report(tolerant=True))
    assert checks.check_dataset(data).errors() == ["boxes of another size"]
    assert np.flatnonzero(data.misfit).tolist() == [0]


def test_boxes_that_the_sample_of_headers_misses_are_moved_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(placing, "SOME_IMAGES", 2)  # the first and the last
    (tmp_path / "train").mkdir()
    for index, factor in enumerate((1, 0.5, 1, 1)):
        draw(tmp_path / "train" / f"{index}.png", factor=factor)
    draw(tmp_path / "train" / "2.png", size=(60, 60), box=(1, 1, 9, 9))
    write_coco(tmp_path, [(WIDTH, HEIGHT)] * 4, [BOX, (10, 20, 110, 70)])
    data = CocoDataset(tmp_path, "train")
    assert data.report.counts == {}
    assert data[1]["annot"][0, :4].tolist() == white_box(data[1]["img"]) == [5, 10, 25, 15]
    assert data.image_sizes[:2].tolist() == [[HEIGHT, WIDTH], [HEIGHT // 2, WIDTH // 2]]
    with pytest.raises(UserError, match=r"image 3: .*its boxes fit only the declared size"):
        data[2]
    data = CocoDataset(tmp_path, "train")
    counts = checks.check_dataset(data, "headers").counts
    assert counts["scaled boxes"] == counts["boxes of another size"] == 1
    assert np.flatnonzero(data.misfit).tolist() == [2]
    assert data.load_annotations(1)[0].tolist() == [5, 10, 25, 15, 0]


def test_all_headers_are_read_if_one_of_the_sample_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(placing, "SOME_IMAGES", 2)
    (tmp_path / "train").mkdir()
    for index in range(4):
        draw(tmp_path / "train" / f"{index}.png", factor=0.5)
    write_coco(tmp_path, [(WIDTH, HEIGHT)] * 4)
    assert_boxes_fit(data := CocoDataset(tmp_path, "train"))
    assert data.report.counts == {"scaled boxes": 4}


def test_programs_agree_about_turned_boxes_and_convert_writes_them_upright(tmp_path, capsys, caplog, monkeypatch):
    (tmp_path / "train").mkdir()
    for index in range(2):
        draw(tmp_path / "train" / f"{index}.png", orientation=6)
    write_coco(tmp_path, [(WIDTH, HEIGHT)] * 2)
    common = ["--coco_path", str(tmp_path), "--coco_train_set", "train", "--coco_val_set", "none"]
    assert check.main(["--dataset", "coco", *common]) == 0
    assert capsys.readouterr().out.count("its boxes are turned by EXIF as the image is (2 times") == 1
    source = ["--from", "coco", "--source", str(tmp_path), "--set", "train"]
    for kind in ("csv", "coco", "voc", "yolo"):
        assert convert.main([*source, "--to", kind, "--out", str(tmp_path / kind)]) == 0
        assert "its boxes are turned" in capsys.readouterr().out
    assert_boxes_fit(CSVDataset(tmp_path / "csv/train.csv", tmp_path / "csv/classes.csv"))
    assert_boxes_fit(data := CocoDataset(tmp_path / "coco", "train"))
    assert data.report.counts == {}
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.WARNING, "retinanet"):
        checks.check_before_training(CocoDataset(tmp_path, "train"), None, strict=False)
    assert "its boxes are turned by EXIF" in caplog.text
    assert train.main(["--dataset", "coco", *common, "--strict", "--out_dir", str(tmp_path / "run")]) == 1


def test_images_are_left_out_with_everything_that_belongs_to_them(tmp_path):
    (tmp_path / "train").mkdir()
    for index in (0, 2):
        draw(tmp_path / "train" / f"{index}.png", orientation=6)
    write_coco(tmp_path, [(WIDTH, HEIGHT)] * 3, [BOX, (0, 0, 30, 30)])
    data = CocoDataset(tmp_path, "train", report=Report(skip_bad=True))
    checks.leave_out_bad_images(data, workers=1)
    assert data.image_ids == [1, 3] and data.image_index.tolist() == [0, 0, 1, 1] and data.offsets.tolist() == [0, 2, 4]
    assert_boxes_fit(data)
    assert sorted(data.coco.anns) == [1, 2, 21, 22]
    (tmp_path / "train" / "2.png").unlink()
    (tmp_path / "train" / "0.png").unlink()
    with pytest.raises(UserError, match="none of its 3 images can be read"):
        checks.leave_out_bad_images(CocoDataset(tmp_path, "train", report=Report(skip_bad=True)), 1)


def test_images_without_a_declared_size_are_measured_and_their_boxes_stay(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, factor=0.5)
    sizes = np.array([[HEIGHT, WIDTH], [0, 0]])
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    annotations = [[*BOX, 0], [5, 10, 25, 15, 0]]
    data = dataset.DetectionDataset(files, annotations, [0, 1], ["thing"], declared_sizes=sizes)
    assert data.annotations[:, :4].tolist() == [[5, 10, 25, 15]] * 2
    assert data.image_sizes.tolist() == [[HEIGHT // 2, WIDTH // 2]] * 2 and data[1]["annot"][0, 0] == 5
