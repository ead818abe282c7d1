import csv
import logging
import os

import pytest
from helpers import gradient, in_memory, save, truncate, write_coco_data, write_csv_data

import train
from retinanet.commands import check, convert
from retinanet.data import checks, placing
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.files import missing_folder
from retinanet.data.report import DataError, Report
from retinanet.data.shapes import ShapesDataset
from retinanet.process import log

GOOD = "a.png,1,1,9,9,circle"
LINES = [GOOD, "a.png,4,8,24,40,rectangle", "b.png,30,10,40,40,triangle"]


def counts_of(folder, lines, depth="quick"):
    """The number of problems of each kind in a CSV file with these lines."""
    return checks.check_dataset(CSVDataset(*write_csv_data(folder, lines)), depth).counts


def places(report, kind):
    """Where the examples of a kind are: the line numbers after the file's name."""
    return [problem.where.split("data.csv")[1] for problem in report.examples.get(kind, [])]


def test_good_data_has_no_problems(tmp_path):
    assert counts_of(tmp_path, LINES, "decode") == {}
    assert checks.check_dataset(ShapesDataset(20)).counts == {}


def test_boxes_within_a_pixel_of_the_border_are_not_reported(tmp_path):
    assert counts_of(tmp_path, [*LINES, "a.png,-0.5,0,64.5,48.9,circle"]) == {}


def test_many_boxes_in_a_small_image_are_fine(tmp_path):
    save(gradient(278, 400), tmp_path / "crowd.png")
    lines = [f"crowd.png,{x},{y},{x + 30},{y + 25},circle" for x in range(0, 345, 15) for y in range(0, 250, 50)]
    assert len(lines) == 115 and counts_of(tmp_path, lines, "decode") == {"unused class": 2}


def test_swapped_boxes_are_recognised(tmp_path):
    # a.png is 64 wide and 48 high, so these boxes are valid as y1, x1, y2, x2.
    lines = [f"a.png,{y},40,{y + 9},60,circle" for y in (1, 20, 30, 38)]
    assert "looks swapped" in counts_of(tmp_path, lines)


def test_an_unused_class_and_a_set_without_boxes_matter_for_training_only(tmp_path):
    data, classes = write_csv_data(tmp_path, LINES[:2])
    report = checks.check_dataset(CSVDataset(data, classes))
    assert report.counts == {"unused class": 1} and "'triangle'" in report.text(report.counts)
    assert checks.check_dataset(CSVDataset(data, classes), training=False).counts == {}
    empty = CSVDataset(*write_csv_data(tmp_path, ["a.png,,,,,"]))
    assert checks.check_dataset(empty).errors() == ["no boxes"]
    assert checks.check_dataset(empty, training=False).warnings() == ["no validation boxes"]


def test_each_depth_finds_the_broken_images_that_it_looks_at(tmp_path):
    files = write_csv_data(tmp_path, LINES)
    truncate(tmp_path / "a.png")  # its header is whole
    (tmp_path / "b.png").write_text("not an image")
    found = {}
    for depth, workers in zip(checks.DEPTHS, (0, 0, 2, 2), strict=True):
        report = checks.check_dataset(CSVDataset(*files), depth, workers)
        found[depth] = places(report, "unreadable image")
    report = checks.check_dataset(CSVDataset(*files), "decode", workers=0)
    assert places(report, "unreadable image") == found["decode"]
    assert found == {"none": [], "quick": [":3"], "headers": [":3"], "decode": [":1", ":3"]}


def test_the_cheap_check_reads_some_headers_of_images_whose_sizes_are_declared(tmp_path, monkeypatch):
    root = write_coco_data(tmp_path)
    for name in ("a.png", "b.png", "empty.png"):
        (tmp_path / "images" / "val2017" / name).write_text("not an image")
    assert checks.check_dataset(CocoDataset(root, "val2017")).counts["unreadable image"] == 3
    for module in (placing, checks):
        monkeypatch.setattr(module, "SOME_IMAGES", 2)
    assert checks.check_dataset(CocoDataset(root, "val2017")).counts["unreadable image"] == 2


def test_sizes_that_the_cheap_check_reads_are_not_read_again(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path, LINES))
    checks.check_dataset(data)
    (tmp_path / "a.png").unlink()
    assert data.image_sizes.tolist() == [[48, 64], [64, 48]]


def test_images_in_both_sets_are_found_by_path_and_by_content(tmp_path):
    train = CSVDataset(*write_csv_data(tmp_path / "train", LINES))
    val = CSVDataset(*write_csv_data(tmp_path / "val", ["b.png,,,,,", "../train/a.png,,,,,"]))
    by_path, by_content = Report(), Report()
    checks.compare_sets(train, val, False, by_path)
    checks.compare_sets(train, val, True, by_content)
    assert places(by_path, "leak") == ["", ":2"]
    assert places(by_content, "leak") == ["", ":1", ":2"]


def test_an_image_with_two_names_is_reported(tmp_path):
    files = write_csv_data(
        tmp_path, ["a.png,4,8,24,40,rectangle", "c.png,30,10,60,40,circle", "b.png,1,1,9,9,triangle"]
    )
    (tmp_path / "c.png").symlink_to("a.png")
    report = checks.check_dataset(CSVDataset(*files))
    assert report.counts == {"repeated image": 1}
    assert "data.csv:2: 'c.png' repeats" in report.text(["repeated image"])


def test_training_stops_before_it_writes_anything(tmp_path, capsys):
    def flags(lines):
        data, classes = write_csv_data(tmp_path, lines)
        return ["--dataset", "csv", "--csv_train", data, "--csv_classes", classes]

    out_dir = tmp_path / "run"
    common = ["--depth", "18", "--weights", "none", "--out_dir", str(out_dir), "--device", "cpu"]
    assert train.main([*flags([*LINES, "gone.png,1,1,9,9,circle"]), *common]) == 1
    assert "data.csv:4: image 'gone.png' does not exist" in capsys.readouterr().err
    assert train.main([*flags([*LINES, GOOD]), "--strict", *common]) == 1
    assert "data.csv:4: repeats a box" in capsys.readouterr().err
    assert not out_dir.exists()


def test_warnings_are_logged_once_before_training(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "handlers", [])  # an earlier test may have redirected the log
    monkeypatch.setattr(log, "propagate", True)
    data = CSVDataset(*write_csv_data(tmp_path, [*LINES, GOOD]))
    with caplog.at_level(logging.WARNING, "retinanet"):
        checks.check_before_training(data, None, strict=False)
    messages = [record.message.split(": ", 1)[1] for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == ["repeats a box of the same image and class: 1,1,9,9"]
    with pytest.raises(DataError):
        checks.check_before_training(data, None, strict=True)


# Guesses


def coco_boxes(folder, boxes, size=(128, 96)):
    """The report of a COCO set with one box (x, y, width, height) in each image."""
    content = {
        "images": [
            {"id": n, "file_name": "a.png", "width": size[0], "height": size[1]} for n in range(1, len(boxes) + 1)
        ],
        "categories": [{"id": 1, "name": "card"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": list(box), "iscrowd": 0}
            for n, box in enumerate(boxes, start=1)
        ],
    }
    root = write_coco_data(folder, content)
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.png"
        save(gradient(size[1], size[0]), folder / "images" / "val2017" / image["file_name"])
    write_coco_data(folder, content)
    return checks.check_dataset(CocoDataset(root, "val2017"))


@pytest.mark.parametrize(("over", "policy"), [(3, None), (4, None), (12, "warned"), (35, "fatal")])
def test_the_overhang_of_boxes_decides_between_nothing_a_guess_and_an_error(tmp_path, over, policy):
    # Cards 40 wide and 60 high; four of twenty exceed the right border. With x and y swapped, all would fit.
    boxes = [(30, 20, 40, 60)] * 16 + [(100 - 40 + over, 5, 40, 60)] * 4
    save(gradient(140, 100), tmp_path / "tall.png")
    lines = [f"tall.png,{x},{y + n},{x + w},{y + h + n},circle" for n, (x, y, w, h) in enumerate(boxes)]
    report = checks.check_dataset(CSVDataset(*write_csv_data(tmp_path, lines)), training=False)
    kinds = {"warned": "guess", "fatal": "looks swapped"}
    assert [kind for kind in report.counts if "box" not in kind] == ([kinds[policy]] if policy else [])
    if policy:
        assert ("a guess: " in report.text([kinds[policy]])) == (policy == "warned")


def test_large_objects_that_overhang_are_not_taken_for_corners(tmp_path):
    report = coco_boxes(tmp_path, [(20, 8, 90, 70)] * 16 + [(41, 8, 90, 70)] * 4)  # 3 px too far right
    assert report.counts == {"box partly outside": 4} and report.errors() == []
    far = coco_boxes(tmp_path / "far", [(20, 8, 90, 70)] * 16 + [(50, 8, 90, 70)] * 4)  # 12 px
    assert far.counts == {"guess": 1, "box partly outside": 4} and far.errors() == []
    corners = coco_boxes(tmp_path / "corners", [(60, 50, 120, 90)] * 10 + [(5, 5, 20, 20)] * 10)
    assert corners.errors() == ["looks like x1, y1, x2, y2"]


# Both sets


def test_a_leak_comes_first_with_its_share(tmp_path):
    names = [f"{index}.png" for index in range(30)]
    for name in names:
        save(gradient(20, 20), tmp_path / name)
    lines = [f"{name},1,1,9,9,circle" for name in names]
    train_set = CSVDataset(*write_csv_data(tmp_path, [*lines, *(f"./{line}" for line in lines)]))
    val_set = CSVDataset(*write_csv_data(tmp_path, [*lines, "a.png,,,,,"]))
    report = checks.check_dataset(train_set)
    checks.compare_sets(train_set, val_set, False, report)
    assert report.counts["leak"] == report.counts["repeated image"] == 30
    first, second, *_ = report.text(report.warnings(), 3).split("\n")
    assert first == "leak (warned): 30"
    assert second.endswith("data.csv: 30 of 31 images of the validation set are also trained on")


def test_links_to_one_file_are_one_image(tmp_path):
    train_set = CSVDataset(*write_csv_data(tmp_path / "train", LINES))
    files = write_csv_data(tmp_path / "val", ["link.png,1,1,9,9,circle", "b.png,1,1,9,9,circle"])
    (tmp_path / "val" / "link.png").symlink_to("../train/a.png")
    report = Report()
    checks.compare_sets(train_set, CSVDataset(*files), False, report)
    assert report.counts == {"leak": 1} and "1 of 2 images of the validation set is also" in report.text(["leak"])


def test_different_classes_are_fatal(tmp_path, capsys):
    for name, classes in (("train", 4), ("val", 3)):
        write_csv_data(tmp_path / name, [f"a.png,1,1,{9 + n},9,class {n}" for n in range(classes)])
        (tmp_path / name / "classes.csv").write_text("".join(f"class {n},{n}\n" for n in range(classes)))
    train_set, val_set = (
        CSVDataset(tmp_path / name / "data.csv", tmp_path / name / "classes.csv") for name in ("train", "val")
    )
    with pytest.raises(DataError, match=r"different classes: the validation set lacks 'class 3'$"):
        checks.check_before_training(train_set, val_set, strict=False)
    assert checks.check_dataset(val_set, training=False).counts == {}


# Bad data
def test_all_problems_are_found_at_once(tmp_path, capsys):
    lines = [GOOD, "a.png,9,1,3,9,circle", "gone.png,1,1,9,9,circle", "a.png,40,1,90,9,circle", "a.png,1,1,9,8,cirle"]
    files = write_csv_data(tmp_path, lines)
    assert (
        check.main(["--dataset", "csv", "--csv_train", files[0], "--csv_classes", files[1], "--csv_val", files[0]]) == 1
    )
    text = capsys.readouterr().out
    for kind in ("inverted box", "unknown class", "missing image", "box partly outside", "leak"):
        assert f"{kind} (" in text
    assert "did you mean 'circle'?" in text and text.endswith("training would not start\n")


def test_skip_bad_leaves_out_and_lists_bad_data_in_all_programs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = ["a.png,9,1,3,9,circle", "gone.png,1,1,9,9,circle", "a.png,1,x,9,9,circle", "b.png,1,1,9,9,cat"]
    files = write_csv_data(tmp_path, [*LINES, *bad, *(f"none/{n}.png,1,1,9,9,circle" for n in range(25)), "t.png,,,,,"])
    save(gradient(48, 64), tmp_path / "t.png")
    truncate(tmp_path / "t.png")
    flags = ["--dataset", "csv", "--csv_train", files[0], "--csv_classes", files[1]]
    common = ["--depth", "18", "--weights", "none", "--device", "cpu", "--out_dir", str(tmp_path / "run")]
    assert check.main(flags) == train.main([*flags, *common]) == 1
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    assert check.main([*flags, "--skip_bad", "--strict"]) == 0
    text = capsys.readouterr().out
    assert "data.csv: 2 images, 0 of them without boxes; 3 boxes" in text and "missing image (skipped): 26" in text
    source = ["--from", "csv", "--source", files[0], "--csv_classes", files[1], "--skip_bad"]
    assert convert.main([*source, "--to", "coco", "--out", str(tmp_path / "coco")]) == 0
    assert "30 bad images and annotations were left out" in capsys.readouterr().out
    with (tmp_path / "coco" / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 and {row["file"] for row in rows} == {files[0]}
    lines = [int(row["where"].removeprefix(f"{files[0]}:")) for row in rows]
    assert sorted(lines) == [*range(4, 34)]
    assert "cannot be read as an image" in rows[-1]["reason"]
    assert len(CocoDataset(tmp_path / "coco", "data")) == 2


def test_a_validation_set_without_boxes_is_reported_before_training(tmp_path):
    train_set = CSVDataset(*write_csv_data(tmp_path / "train", LINES))
    val_set = CSVDataset(*write_csv_data(tmp_path / "val", ["a.png,,,,,"]))
    checks.check_before_training(train_set, val_set, strict=False)
    with pytest.raises(DataError, match=r"val/data\.csv: has no boxes, so AP cannot be measured"):
        checks.check_before_training(train_set, val_set, strict=True)


def test_missing_images_are_grouped_by_missing_folder(tmp_path):
    lines = [f"{folder}/{n}.png,1,1,9,9,circle" for folder in ("x", "y") for n in range(40)]
    report = checks.check_dataset(CSVDataset(*write_csv_data(tmp_path, [*lines, "gone.png,,,,,"])))
    text = report.text(["missing image"]).split("\n")
    assert text[0] == "missing image (fatal): 81" and len(text) == 4
    assert "'x/0.png' does not exist, nor does its folder" in text[1] and "(40 times; this is the first)" in text[1]


def test_the_summary_uses_singular_and_plural(tmp_path):
    text = checks.summary(CSVDataset(*write_csv_data(tmp_path, [GOOD])))
    assert "1 image, 0 of them without boxes; 1 box, at most 1 in an image; 3 classes" in text
    assert "1 box in        1 image" in text and "0 boxes in       0 images" in text


@pytest.mark.parametrize("line", ["a.png,,,,,", "a.png;1,5;2,5;30;40;cat"])
def test_a_data_set_without_classes_is_summarised(tmp_path, line):
    data = CSVDataset(write_csv_data(tmp_path, [line])[0], report=Report(tolerant=True))
    assert "0 boxes" in checks.summary(data) and "0 class" in checks.summary(data)


def test_missing_images_are_grouped_by_the_topmost_missing_folder(tmp_path):
    lines = [f"imgs/{folder}/a.png,1,1,9,9,circle" for folder in range(50)]
    report = checks.check_dataset(CSVDataset(*write_csv_data(tmp_path, lines)))
    (problem,) = report.examples["missing image"]
    assert problem.count == 50 and problem.message.count(f"its folder '{tmp_path}/imgs'") == 1


def test_a_folder_that_exists_is_looked_for_once_for_each_missing_image(tmp_path, monkeypatch):
    asked, is_folder = [], os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: asked.append(str(path)) or is_folder(path))
    assert missing_folder(f"{tmp_path}/a.png") == "" and asked == [str(tmp_path)]
    assert missing_folder(f"{tmp_path}/b/c/a.png") == f"{tmp_path}/b"
    assert missing_folder("b" * 999 + "/a.png") == "b" * 999 and missing_folder("a.png") == ""


@pytest.mark.parametrize(("number", "message"), [(1, "1 bad image or annotation was left"), (2, "2 bad images and")])
def test_what_was_left_out_is_counted(caplog, number, message):
    data = in_memory([[0, 0, 9, 9, 0]])
    data.source = "a.csv"
    data.report.skipped = [("row 1", "missing image")] * number
    with caplog.at_level("WARNING"):
        checks.write_skipped(None, [data])
    assert message in caplog.text
