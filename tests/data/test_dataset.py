import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import coco_content, gradient, save, truncate, write_coco_data, write_csv_data
from PIL import Image, ImageOps

from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.images import read_image, read_image_size
from retinanet.errors import UserError


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# Pictures


def test_a_png_is_read_exactly(tmp_path):
    picture = gradient(20, 30)
    path = save(picture, tmp_path / "rgb.png")
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, picture)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_are_read_as_pillow_reads_them(tmp_path, mode):
    path = tmp_path / "picture.jpg"
    source = Image.fromarray(gradient(40, 56)).convert(mode)
    source.save(path, quality=95)
    with Image.open(path) as saved:
        assert saved.mode == mode
        expected = np.asarray(saved.convert("RGB"))
    image = read_image(path)
    assert np.abs(image.astype(int) - expected).max() <= 2
    assert np.abs(image.astype(int) - np.asarray(source.convert("RGB"))).mean() < 3  # and not inverted


def test_grey_is_spread_over_three_channels(tmp_path):
    grey = gradient(8, 9)[..., 0]
    np.testing.assert_array_equal(read_image(save(grey, tmp_path / "grey.png")), np.repeat(grey[..., None], 3, axis=2))


def test_grey_with_alpha_loses_its_alpha(tmp_path):
    pixels = np.stack([gradient(8, 9)[..., 0], np.full((8, 9), 99, np.uint8)], axis=2)
    image = read_image(save(pixels, tmp_path / "la.png"))
    np.testing.assert_array_equal(image, np.repeat(pixels[..., :1], 3, axis=2))


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_rgba_loses_its_alpha_and_keeps_its_colours(tmp_path, alpha):
    picture = gradient(8, 9)
    rgba = np.concatenate([picture, np.full((8, 9, 1), alpha, np.uint8)], axis=2)
    np.testing.assert_array_equal(read_image(save(rgba, tmp_path / "rgba.png")), picture)


def test_a_palette_becomes_its_colours(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [200, 100, 0]]]


def test_black_and_white_becomes_0_and_255(tmp_path):
    picture = Image.new("1", (2, 1))
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png").tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tif"])
def test_16_bit_grey_keeps_its_upper_8_bits(tmp_path, name):
    path = save(np.array([[0x0000, 0x00FF, 0x1234, 0xFFFF]], dtype=np.uint16), tmp_path / name)
    assert read_image(path).tolist() == [[[0] * 3, [0] * 3, [0x12] * 3, [0xFF] * 3]]


def test_16_bit_rgb_keeps_its_upper_8_bits(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = struct.pack(">B3H", 0, 0x1234, 0x8000, 0xFFFF)  # one row: no filter, one pixel
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    (tmp_path / "rgb16.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert read_image(tmp_path / "rgb16.png").tolist() == [[[0x12, 0x80, 0xFF]]]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_orientation_6_is_turned_clockwise(tmp_path, suffix):
    picture = np.zeros((16, 32, 3), dtype=np.uint8)
    picture[:, :16] = 255  # left half white
    path = save(picture, tmp_path / f"turned.{suffix}", exif=exif(6))
    image = read_image(path)
    assert image.shape == (32, 16, 3)
    assert image[:16].min() > 250 and image[16:].max() < 5  # upper half white
    assert read_image_size(path) == (32, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, suffix, orientation):
    path = save(gradient(24, 40), tmp_path / f"turned.{suffix}", exif=exif(orientation))
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    image = read_image(path)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= 2
    assert read_image_size(path) == image.shape[:2]


def test_pictures_can_be_written_to(tmp_path):
    for name in ("a.png", "a.jpg", "a.bmp"):
        read_image(save(gradient(4, 4), tmp_path / name))[:] = 0


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.gif", "a.tif", "a.webp"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9])
def test_a_truncated_picture_is_an_error_that_names_it(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = save(noise, tmp_path / name)
    truncate(path, share)
    with pytest.raises(UserError, match=f"{name}: cannot be read as a picture"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, read_image_size])
def test_what_is_no_picture_is_an_error_that_names_it(tmp_path, read):
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "hollow.jpg").write_bytes(b"\xff\xd8 a JPEG's ends, and nothing between \xff\xd9")
    for name in ("text.jpg", "hollow.jpg", "missing.jpg", "."):
        with pytest.raises(UserError, match="cannot be read as a picture") as error:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


# CSV


def test_csv_samples_by_hand(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path))
    assert len(data) == 2
    sample = data[0]
    assert sample["img"].shape == (48, 64, 3) and sample["img"].dtype == np.uint8
    assert sample["annot"].dtype == np.float32
    assert sample["annot"].tolist() == [[4, 8, 24, 40, 1], [30, 10, 60, 40, 0]]
    assert sample["index"] == 0


def test_a_csv_picture_without_boxes_is_a_negative(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path))
    assert data[1]["annot"].shape == (0, 5)
    assert data[1]["img"].shape == (64, 48, 3)


def test_csv_data_may_have_no_box_at_all(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path, ["a.png,,,,,", "b.png,,,,,"]))
    assert [data[index]["annot"].shape for index in (0, 1)] == [(0, 5), (0, 5)]


def test_csv_boxes_of_a_picture_need_not_stand_together(tmp_path):
    lines = ["a.png,1,1,9,9,circle", "b.png,2,2,9,9,circle", "a.png,3,3,9,9,triangle"]
    data = CSVDataset(*write_csv_data(tmp_path, lines))
    assert data.load_annotations(0)[:, 0].tolist() == [1, 3]
    assert data.load_annotations(1)[:, 0].tolist() == [2]


def test_the_number_of_classes_comes_from_the_csv_file(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path))
    assert data.num_classes() == 3
    assert data.labels == {0: "circle", 1: "rectangle", 2: "triangle"}
    assert [data.name_to_label(data.label_to_name(label)) for label in range(3)] == [0, 1, 2]


def test_class_ids_may_stand_in_any_order(tmp_path):
    data_file, class_file = write_csv_data(tmp_path)
    Path(class_file).write_text("triangle,2\ncircle,0\nrectangle,1\n")
    assert list(CSVDataset(data_file, class_file).labels.values()) == ["circle", "rectangle", "triangle"]


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    data_file, class_file = write_csv_data(tmp_path)
    for path in (data_file, class_file):
        Path(path).write_text("\n" + Path(path).read_text() + "\n", encoding="utf-8-sig")
    data = CSVDataset(data_file, class_file)
    assert len(data) == 2 and data.num_classes() == 3
    assert data[0]["img"].shape == (48, 64, 3)


def test_relative_csv_paths_start_at_the_csv_folder_then_at_the_working_directory(tmp_path, monkeypatch):
    files = write_csv_data(tmp_path / "data", ["a.png,,,,,", "only_here.png,,,,,"])
    here = tmp_path / "here"
    here.mkdir()
    save(np.zeros((5, 6, 3), np.uint8), here / "a.png")
    save(np.zeros((7, 8, 3), np.uint8), here / "only_here.png")
    monkeypatch.chdir(here)
    data = CSVDataset(*files)
    assert data[0]["img"].shape == (48, 64, 3)
    assert data[1]["img"].shape == (7, 8, 3)
    assert data.image_sizes.tolist() == [[48, 64], [7, 8]]


def test_absolute_csv_paths_are_taken_as_they_are(tmp_path):
    path = save(gradient(9, 11), tmp_path / "elsewhere.png")
    data = CSVDataset(*write_csv_data(tmp_path / "data", [f"{path},,,,,"]))
    assert data[0]["img"].shape == (9, 11, 3)


def test_a_missing_csv_picture_names_the_line_that_wants_it(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path, ["a.png,,,,,", "a.png,1,1,2,2,circle", "gone.png,1,1,2,2,circle"]))
    for read in (lambda: data[1], lambda: data.image_sizes):
        with pytest.raises(UserError, match=r"data\.csv:3: .*gone\.png"):
            read()


GOOD = "a.png,1,1,9,9,circle"


# The original died of a NameError in place of each of these messages.
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png,1,1,9,9,dog", r"data\.csv:2: class 'dog' is not in the class list \(circle, rectangle, triangle\)"),
        ("a.png,1,1,9,9,", r"data\.csv:2: class '' is not"),
        ("a.png,9,1,9,9,circle", r"data\.csv:2: a box needs x1 < x2 and y1 < y2.*found 9,1,9,9"),
        ("a.png,9,1,3,9,circle", r"data\.csv:2: a box needs x1 < x2"),
        ("a.png,1,9,9,3,circle", r"data\.csv:2: a box needs x1 < x2"),
        ("a.png,1,1,nan,9,circle", r"data\.csv:2: a box needs"),
        ("a.png,nan,1,9,9,circle", r"data\.csv:2: a box needs"),
        ("a.png,-inf,1,9,9,circle", r"data\.csv:2: a box needs"),
        ("a.png,1,1,9,inf,circle", r"data\.csv:2: a box needs"),
        ("a.png,1,1,9,circle", r"data\.csv:2: expected `path,x1,y1,x2,y2,class_name`, found 5 columns"),
        ("a.png", r"data\.csv:2: expected .*, found 1 columns"),
        ("a.png,1,1,9,9,circle,7", r"data\.csv:2: expected .*, found 7 columns"),
        ("a.png,1,one,9,9,circle", r"data\.csv:2: x1, y1, x2, y2 must be numbers.*'one'"),
        ("a.png,1,,9,9,circle", r"data\.csv:2: x1, y1, x2, y2 must be numbers"),
    ],
)
def test_a_bad_csv_line_is_an_error_with_file_and_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        CSVDataset(*write_csv_data(tmp_path, [GOOD, line, GOOD]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("circle,0\nrectangle\n", r"classes\.csv:2: expected `class_name,id`, found 1 columns"),
        ("circle,0\ntriangle,two\n", r"classes\.csv:2: the class id must be a whole number, not 'two'"),
        ("circle,0\ntriangle,-1\n", r"classes\.csv:2: the class id must be a whole number, not '-1'"),
        ("circle,0\ncircle,1\n", r"classes\.csv:2: class 'circle' .* twice"),
        ("circle,0\ntriangle,0\n", r"classes\.csv:2: .* its id 0 stands there twice"),
        ("circle,1\ntriangle,2\n", r"classes\.csv: class ids must run from 0 without gaps, found \[1, 2\]"),
        ("", r"classes\.csv: "),
    ],
)
def test_a_bad_class_list_is_an_error_with_file_and_line(tmp_path, text, message):
    data_file, class_file = write_csv_data(tmp_path)
    Path(class_file).write_text(text)
    with pytest.raises(UserError, match=message):
        CSVDataset(data_file, class_file)


def test_csv_files_that_are_missing_empty_or_not_text_are_errors(tmp_path):
    data_file, class_file = write_csv_data(tmp_path)
    with pytest.raises(UserError, match=r"no\.csv: cannot be read"):
        CSVDataset(tmp_path / "no.csv", class_file)
    with pytest.raises(UserError, match=r"no\.csv: cannot be read"):
        CSVDataset(data_file, tmp_path / "no.csv")
    with pytest.raises(UserError, match=r"a\.png:.*UTF-8"):
        CSVDataset(tmp_path / "a.png", class_file)
    Path(data_file).write_text("\n")
    with pytest.raises(UserError, match=r"data\.csv: (is empty|lists no images)"):
        CSVDataset(data_file, class_file)


# COCO


def test_coco_samples_by_hand(tmp_path):
    data = CocoDataset(write_coco_data(tmp_path), "val2017")
    assert data.image_ids == [7, 42, 99]
    assert data[0]["annot"].tolist() == [[1, 2, 31, 42, 0], [10, 10, 18, 19.5, 1]]
    assert data[1]["annot"].tolist() == [[5, 6, 25, 36, 1]]
    assert data[0]["img"].shape == (48, 64, 3)


def test_coco_crowds_are_left_out_of_training_but_not_of_evaluation(tmp_path):
    content = coco_content()
    content["annotations"].append({**content["annotations"][3], "id": 5, "iscrowd": 0})  # no duplicate of the crowd
    data = CocoDataset(write_coco_data(tmp_path, content), "val2017")
    assert data.annotation_ids.tolist() == [2, 3, 5, 1] and not data.report.counts
    assert data.load_difficult(0).tolist() == [[0, 0, 64, 48, 1]]
    assert [entry["id"] for entry in data.coco.loadAnns(data.coco.getAnnIds(iscrowd=True))] == [4]


def test_a_coco_picture_without_boxes_is_a_negative(tmp_path):
    sample = CocoDataset(write_coco_data(tmp_path), "val2017")[2]
    assert sample["annot"].shape == (0, 5) and sample["img"].shape == (48, 48, 3)


def test_the_number_of_classes_comes_from_the_coco_file(tmp_path):
    data = CocoDataset(write_coco_data(tmp_path), "val2017")
    assert data.num_classes() == 2  # the original: 80, always
    assert data.labels == {0: "car", 1: "cat"}
    assert [data.label_to_coco_label(label) for label in (0, 1)] == [3, 17]
    assert [data.coco_label_to_label(category_id) for category_id in (3, 17)] == [0, 1]


def test_coco_pictures_may_lie_beside_the_annotations_folder(tmp_path):
    data = CocoDataset(write_coco_data(tmp_path, pictures="."), "val2017")
    assert data[0]["img"].shape == (48, 64, 3)


def test_coco_sizes_come_from_the_annotations_or_else_from_the_pictures(tmp_path):
    expected = [[48, 64], [64, 48], [48, 48]]
    content = coco_content()
    for image in content["images"]:
        del image["width"], image["height"]
    assert CocoDataset(write_coco_data(tmp_path / "without", content), "val2017").image_sizes.tolist() == expected
    root = write_coco_data(tmp_path / "with")
    for picture in Path(root).glob("images/*/*.png"):
        picture.unlink()
    data = CocoDataset(root, "val2017")
    assert data.image_sizes.tolist() == expected
    assert data.image_aspect_ratio(0) == pytest.approx(64 / 48)


def test_coco_boxes_below_a_pixel_are_skipped(tmp_path):
    content = coco_content()
    content["annotations"][0]["bbox"] = [5, 6, 0.5, 30]
    content["annotations"][1]["bbox"] = [5, 6, 30, 0]
    assert CocoDataset(write_coco_data(tmp_path, content), "val2017").annotations[:, 0].tolist() == [10]


def test_evaluation_gets_along_without_area_and_iscrowd(tmp_path):
    content = coco_content()
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    truth = CocoDataset(write_coco_data(tmp_path, content), "val2017").coco
    assert [(entry["area"], entry["iscrowd"]) for entry in truth.loadAnns([1, 3])] == [(600, 0), (76, 0)]


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_coco_file_without_one_of_its_lists_is_an_error(tmp_path, key):
    content = coco_content()
    del content[key]
    with pytest.raises(UserError, match=rf"instances_val2017\.json: has no list named `{key}`"):
        CocoDataset(write_coco_data(tmp_path, content), "val2017")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content["images"].clear(), "its list `images` is empty"),
        (lambda content: content["categories"].clear(), "its list `categories` is empty"),
        (lambda content: content["images"][1].pop("file_name"), "entry 1 of `images`.*needs.*file_name"),
        (lambda content: content["categories"][0].pop("name"), "entry 0 of `categories`.*needs.*name"),
        (lambda content: content["annotations"][2].pop("bbox"), "annotation 3.*needs bbox"),
        (lambda content: content["annotations"][0].update(image_id=8), "annotation 1: .*image.* 8"),
        (lambda content: content["annotations"][1].update(category_id=5), "annotation 2: .*category.* 5"),
        (lambda content: content["annotations"][2].update(bbox=[1, 2, 3]), r"annotation 3: .*bbox \[1, 2, 3\]"),
        (lambda content: content["annotations"][2].update(bbox=None), "annotation 3: .*bbox None"),
        (lambda content: content["annotations"][2].update(bbox=[float("nan"), 1, 5, 5]), "annotation 3: .*bbox .nan"),
    ],
)
def test_a_bad_coco_entry_is_an_error_that_names_it(tmp_path, spoil, message):
    content = coco_content()
    spoil(content)
    with pytest.raises(UserError, match=rf"instances_val2017\.json: .*{message}"):
        CocoDataset(write_coco_data(tmp_path, content), "val2017")


def test_a_coco_file_that_is_missing_or_no_json_is_an_error(tmp_path):
    root = write_coco_data(tmp_path)
    with pytest.raises(UserError, match=r"instances_test\.json: cannot be read"):
        CocoDataset(root, "test")
    path = tmp_path / "annotations" / "instances_val2017.json"
    truncate(path)
    with pytest.raises(UserError, match=r"instances_val2017\.json:1: is not valid JSON"):
        CocoDataset(root, "val2017")
    path.write_text(json.dumps([1, 2]))
    with pytest.raises(UserError, match=r"instances_val2017\.json: has no list named"):
        CocoDataset(root, "val2017")


# All data sets


def test_a_transform_is_applied_last(tmp_path):
    def count_boxes(sample):
        return {"boxes": len(sample["annot"]), "shape": sample["img"].shape}

    data = CSVDataset(*write_csv_data(tmp_path), transform=count_boxes)
    assert data[0] == {"boxes": 2, "shape": (48, 64, 3)}


def test_changing_a_sample_does_not_change_the_data(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path))
    data[0]["annot"][:] = 0
    assert data[0]["annot"][0].tolist() == [4, 8, 24, 40, 1]


def test_aspect_ratio_is_width_over_height_after_turning(tmp_path):
    files = write_csv_data(tmp_path)
    save(gradient(48, 64), tmp_path / "a.png", exif=exif(6))
    data = CSVDataset(*files)
    assert data.image_aspect_ratio(0) == pytest.approx(48 / 64)
    assert data.image_aspect_ratio(1) == pytest.approx(48 / 64)


def test_data_sets_can_be_sent_to_another_process(tmp_path):
    for data in (CSVDataset(*write_csv_data(tmp_path)), CocoDataset(write_coco_data(tmp_path), "val2017")):
        copy = pickle.loads(pickle.dumps(data))
        np.testing.assert_array_equal(copy[0]["annot"], data[0]["annot"])


def test_declared_sizes_may_be_written_as_whole_floats(tmp_path):
    content = coco_content()
    for image in content["images"]:
        image["height"] = float(image["height"])
    data = CocoDataset(write_coco_data(tmp_path, content), "val2017")
    assert data.report.counts == {} and data.image_sizes.tolist() == [[48, 64], [64, 48], [48, 48]]


def test_an_area_beyond_all_floats_is_replaced(tmp_path):
    content = coco_content()
    content["annotations"][0]["area"] = 10**400
    data = CocoDataset(write_coco_data(tmp_path, content), "val2017")
    assert data.coco.anns[1]["area"] == 600
