import logging

import numpy as np
import pytest
from helpers import coco_content, gradient, save, truncate, write_coco_data, write_csv_data
from PIL import Image

import train
from retinanet.commands import check as check_command
from retinanet.data import checks
from retinanet.data import report as problems
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.report import POLICIES, DataError, Report
from retinanet.data.shapes import ShapesDataset
from retinanet.errors import UserError
from retinanet.process import log

GOOD = "a.png,1,1,9,9,circle"
LINES = [GOOD, "a.png,4,8,24,40,rectangle", "b.png,30,10,40,40,triangle"]


def csv_report(folder, lines, pictures="quick", text=None):
    """What is found in a CSV file of these lines, whether it can be read or not."""
    data_file, classes = write_csv_data(folder, lines)
    if text is not None:
        (folder / "data.csv").write_bytes(text)
    try:
        return checks.check_dataset(CSVDataset(data_file, classes), pictures)
    except DataError as error:
        return error.report


def coco_report(folder, change, pictures="quick"):
    """What is found in `coco_content`, changed."""
    content = coco_content()
    change(content)
    root = write_coco_data(folder, content)
    try:
        return checks.check_dataset(CocoDataset(root, "val2017"), pictures)
    except DataError as error:
        return error.report


def places(report, kind, source):
    """Where the examples of a kind are: lines or ids after the file's name."""
    return [problem.where.split(source)[1] for problem in report.examples[kind]]


def test_good_data_have_no_problems(tmp_path):
    assert csv_report(tmp_path / "csv", LINES, "decode").counts == {}
    assert coco_report(tmp_path / "coco", lambda content: None, "decode").counts == {}
    assert checks.check_dataset(ShapesDataset(20)).counts == {}


@pytest.mark.parametrize(
    ("lines", "kind", "where", "message"),
    [
        (["a.png,1,1,9,circle"], "wrong column count", ":4", "found 5 columns"),
        (["a.png,1,one,9,9,circle"], "not a number", ":4", "not 'one'"),
        (["a.png,1,1,9,1_0,circle"], "not a number", ":4", "not '1_0'"),
        (['a.png,1,"1,5",9,9,circle'], "not a number", ":4", "the decimal sign is a point"),
        (["a.png,1,1,9,inf,circle"], "not finite", ":4", "found 1,1,9,inf"),
        (["a.png,1,1,nan,9,circle"], "not finite", ":4", "found 1,1,nan,9"),
        (["a.png,1,1,9,1000001,circle"], "not finite", ":4", "at most 1,000,000"),
        (["a.png,9,1,9,9,circle"], "inverted box", ":4", "found 9,1,9,9"),
        (["a.png,1,1,9,9,Circle"], "unknown class", ":4", "did you mean 'circle'?"),
        (["a.png,1,1,9,9,rectagnle"], "unknown class", ":4", "did you mean 'rectangle'?"),
        ([",1,1,9,9,circle"], "bad name", ":4", "path is empty"),
        (["x" * 1025 + ",1,1,9,9,circle"], "bad name", ":4", "has 1,025 characters, more than 1,024"),
        (["gone.png,1,1,9,9,circle"], "missing image", ":4", "there is no picture 'gone.png'"),
        ([r"C:\data\a.png,1,1,9,9,circle"], "missing image", ":4", "is it a Windows path?"),
        (["a.png,1,1,9,1.5,circle"], "sub-pixel box", ":4", "1,1,9,1.5"),
        ([GOOD + " ", "a.png,1.0,1,9,9,circle"], "duplicate box", ":4", "1,1,9,9 stands there before"),
        (["a.png,70,10,80,20,circle"], "box outside", ":4", "70,10,80,20 in a picture of 64 x 48"),
        (["a.png,50,10,80,20,circle"], "box partly outside", ":4", "50,10,80,20 in a picture of 64 x 48"),
        (["a.png,1,1,19,9, circle"], "spaces", ":4", "' circle'"),
        (['"a.png",1,1,19,9,circle'], "quoted fields", ":4", "first"),
    ],
)
def test_a_problem_of_a_csv_line_is_reported_with_its_line(tmp_path, lines, kind, where, message):
    report = csv_report(tmp_path, [*LINES, *lines])
    assert places(report, kind, "data.csv")[0] == where
    assert message in report.examples[kind][0].message
    assert set(report.counts) <= {kind, "spaces", "quoted fields"}


def test_boxes_within_a_pixel_of_the_border_are_not_worth_a_word(tmp_path):
    assert csv_report(tmp_path, [*LINES, "a.png,-0.5,0,64.5,48.9,circle"]).counts == {}


def test_the_form_of_a_csv_file_is_noted(tmp_path):
    text = "\ufeff" + "".join(f"{line}\r\n" for line in LINES)
    assert csv_report(tmp_path, LINES, text=text.encode()).counts == {"byte order mark": 1, "CRLF": 1}


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_are_read_and_reported(tmp_path, separator):
    report = csv_report(tmp_path, [line.replace(",", separator) for line in LINES])
    assert report.counts == {"separator": 1}


def test_a_header_row_is_left_out_and_reported(tmp_path):
    report = csv_report(tmp_path, ["filename,xmin,ymin,xmax,ymax,class", *LINES])
    assert report.counts == {"header row": 1} and places(report, "header row", "data.csv") == [":1"]
    assert csv_report(tmp_path, [*LINES, "filename,xmin,ymin,xmax,ymax,class"]).errors() == ["not a number"]


@pytest.mark.parametrize(
    ("header", "kind"),
    [("path,x,y,w,h,class", "looks like x, y, width, height"), ("path,y1,x1,y2,x2,class", "looks swapped")],
)
def test_a_header_that_names_other_columns_is_fatal(tmp_path, header, kind):
    assert csv_report(tmp_path, [header, *LINES]).errors() == [kind]


def test_widths_in_place_of_corners_are_recognised(tmp_path):
    lines = [f"a.png,{x},20,5,6,circle" for x in range(10, 20)]
    assert csv_report(tmp_path, lines).errors() == ["inverted box", "looks like x, y, width, height"]


def test_normalised_boxes_are_recognised(tmp_path):
    report = csv_report(tmp_path, ["a.png,0.1,0.2,0.5,1,circle", "a.png,0,0,1,1,circle"])
    assert report.errors() == ["looks normalised"]
    assert report.counts == {"looks normalised": 1}


def test_swapped_boxes_are_recognised(tmp_path):
    # a.png is 64 wide and 48 high: these are good as y1, x1, y2, x2.
    lines = [f"a.png,{y},40,{y + 9},60,{name}" for y, name in zip((1, 20, 30, 38), ("circle",) * 4, strict=True)]
    assert "looks swapped" in csv_report(tmp_path, lines).errors()


def test_a_bad_class_list_is_reported_with_all_its_lines(tmp_path):
    data, classes = write_csv_data(tmp_path, LINES)
    (tmp_path / "classes.csv").write_text("circle,0\ncircle,1\nrectangle\ntriangle,two\nstar,0\n")
    with pytest.raises(DataError) as error:
        CSVDataset(data, classes)
    assert places(error.value.report, "class list", "classes.csv") == [":2", ":3", ":4", ":5"]
    (tmp_path / "classes.csv").write_text("circle,0\nrectangle,2\n")
    with pytest.raises(UserError, match=r"without gaps, found \[0, 2\]"):
        CSVDataset(data, classes)


def test_an_unused_class_and_a_set_without_boxes_matter_for_training_only(tmp_path):
    data, classes = write_csv_data(tmp_path, LINES[:2])
    report = checks.check_dataset(CSVDataset(data, classes))
    assert report.counts == {"unused class": 1} and "'triangle'" in report.text(report.counts)
    assert checks.check_dataset(CSVDataset(data, classes), training=False).counts == {}
    empty = CSVDataset(*write_csv_data(tmp_path, ["a.png,,,,,"]))
    assert checks.check_dataset(empty).errors() == ["no boxes"]
    assert checks.check_dataset(empty, training=False).counts == {}


@pytest.mark.parametrize(
    ("change", "kind", "where"),
    [
        (lambda c: c["annotations"][2].update(bbox=[1, 2, "3", 4]), "bad entry", ": annotation 3"),
        (lambda c: c["annotations"][1].update(iscrowd="0"), "bad entry", ": annotation 2"),
        (lambda c: c["annotations"][1].update(iscrowd=2), "bad entry", ": annotation 2"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, float("nan"), 4]), "not finite", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, -3, 4]), "inverted box", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 0, 4]), "sub-pixel box", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[50, 2, 30, 4]), "box partly outside", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[1, 50, 3, 4]), "box outside", ": annotation 3"),
        (lambda c: c["annotations"][2].update(image_id=8), "unknown image", ": annotation 3"),
        (lambda c: c["annotations"][2].update(category_id=8), "unknown class", ": annotation 3"),
        (lambda c: c["annotations"].append({**c["annotations"][2], "id": 9}), "duplicate box", ": annotation 9"),
        (lambda c: c["annotations"][2].update(id=2), "annotation ids", ": annotation 2"),
        (lambda c: c["annotations"][2].update(id=0), "annotation ids", ": annotation 0"),
        (lambda c: c["annotations"][0].update(iscrowd=1), "crowd-only image", ": image 42"),
        (lambda c: c["images"][1].update(id=42), "duplicate image id", ": image id 42"),
        (lambda c: c["images"][0].update(width=64, height=48), "declared size", ": image 42"),
        (lambda c: c["images"][0].update(width=0), "declared size", ": image 42"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "missing image", ": image 42"),
        (lambda c: c["categories"].append({"id": 3, "name": "dog"}), "class list", ": category id 3"),
        (lambda c: c["categories"].append({"id": 4, "name": "cat"}), "class list", ": category name 'cat'"),
        (lambda c: c["categories"].append({"id": 0, "name": "things"}), "unused class", ""),
    ],
)
def test_a_problem_of_a_coco_file_is_reported_with_its_id(tmp_path, change, kind, where):
    report = coco_report(tmp_path, change)
    assert kind in report.counts and places(report, kind, "val2017.json")[0] == where


def test_corners_in_place_of_widths_are_recognised(tmp_path):
    def change(content):
        names = {"image_id": 7, "category_id": 3}
        content["annotations"] = [{"id": n, **names, "bbox": [30 + n, 20 + n, 50 + n, 40]} for n in range(1, 6)]

    assert "looks like x1, y1, x2, y2" in coco_report(tmp_path, change).errors()


def test_swapped_sizes_and_exif_are_told_apart(tmp_path):
    def change(content):
        content["images"][1].update(width=48, height=64)

    assert "are the two swapped?" in coco_report(tmp_path, change).examples["declared size"][0].message
    root = write_coco_data(tmp_path)
    tags = Image.Exif()
    tags[0x0112] = 6
    save(gradient(48, 64), tmp_path / "images" / "val2017" / "a.png", exif=tags)
    report = checks.check_dataset(CocoDataset(root, "val2017"))
    assert "EXIF turns it" in report.examples["declared size"][0].message
    assert report.counts["EXIF rotation"] == 1


def test_broken_pictures_are_found_by_looking_closely_enough(tmp_path):
    files = write_csv_data(tmp_path, LINES)
    truncate(tmp_path / "a.png")  # its header is whole
    (tmp_path / "b.png").write_text("no picture")
    found = {}
    for depth in checks.PICTURES:
        report = checks.check_dataset(CSVDataset(*files), depth, workers=2)
        found[depth] = places(report, "unreadable image", "data.csv") if report.counts else []
    assert found == {"none": [], "quick": [":3"], "headers": [":3"], "decode": [":1", ":3"]}


def test_the_cheap_check_spares_the_sampler_reading_headers_again(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path, LINES))
    checks.check_dataset(data)
    (tmp_path / "a.png").unlink()
    assert data.image_sizes.tolist() == [[48, 64], [64, 48]]


def test_pictures_in_both_sets_are_found_by_path_and_by_content(tmp_path):
    train = CSVDataset(*write_csv_data(tmp_path / "train", LINES))
    val = CSVDataset(*write_csv_data(tmp_path / "val", ["b.png,,,,,", "../train/a.png,,,,,"]))
    by_path, by_content = Report(), Report()
    checks.check_overlap(train, val, False, by_path)
    checks.check_overlap(train, val, True, by_content)
    assert places(by_path, "same image", "data.csv") == [":2"]
    assert places(by_content, "same image", "data.csv") == [":1", ":2"]


def test_no_more_than_20_examples_of_a_kind_are_listed_and_all_are_counted(tmp_path):
    report = csv_report(tmp_path, [GOOD, *["a.png,1,1,9,9,dog"] * 30, *["a.png,1,1,9"] * 1000])
    assert report.counts == {"unknown class": 30, "wrong column count": 1000}
    assert [len(examples) for examples in report.examples.values()] == [20, 20]
    text = report.text(report.errors())
    assert "unknown class (fatal): 30" in text and "... and 980 more" in text and len(text.splitlines()) == 44


def test_strict_makes_all_fatal_but_notes(tmp_path):
    report = Report()
    for kind in POLICIES:
        report.add(kind, "x", "y")
    noted = {kind for kind, policy in POLICIES.items() if policy == problems.NOTED}
    assert set(report.errors(strict=True)) == set(POLICIES) - noted
    assert set(report.warnings(strict=True)) == noted
    assert set(report.errors()) | set(report.warnings()) == set(POLICIES)
    assert all(POLICIES[kind] == "fatal" for kind in report.errors())


def test_messages_from_files_are_short_and_printable():
    for value in ("x" * 10_000, "\ud800", "a\nb", b"\0" * 999, [[["deep"] * 99] * 99] * 99):
        text = problems.shown(value)
        assert len(text) < 1000 and text.isprintable()
        text.encode()


def test_a_kind_of_problem_needs_a_policy():
    with pytest.raises(AssertionError):
        Report().add("no such kind", "x", "y")


# The programs


def flags(folder, lines, val_lines=None):
    data, classes = write_csv_data(folder, lines)
    found = ["--dataset", "csv", "--csv_train", data, "--csv_classes", classes]
    return found if val_lines is None else [*found, "--csv_val", write_csv_data(folder / "val", val_lines)[0]]


def test_the_program_lists_errors_and_warnings_apart(tmp_path, capsys):
    bad = [*LINES, "a.png,1,1,9,9,dog", "gone.png,1,1,9,9.5,circle", "a.png,1,1,2,1.1,circle"]
    assert check_command.main(flags(tmp_path, LINES, bad)) == 1
    text = capsys.readouterr().out
    warnings, errors = text.split("\nerrors:\n")
    assert "data.csv: 2 images, 0 of them without boxes; 3 boxes, at most 2 in an image; 3 classes" in warnings
    assert "'circle'            1 boxes in       1 images" in warnings
    assert "sub-pixel box" in warnings or "data.csv:6: is less than 1 pixel" in warnings
    assert "data.csv:4: class 'dog' is not in the class list" in errors
    assert text.endswith("training would not start\n")


def test_the_program_says_where_nothing_is_wrong(tmp_path, capsys):
    assert check_command.main(flags(tmp_path, LINES)) == 0
    assert capsys.readouterr().out.endswith("nothing is wrong\n")
    assert check_command.main(["--dataset", "shapes", "--shapes_train", "20", "--shapes_val", "5"]) == 0


def test_strict_turns_warnings_into_a_bad_status(tmp_path, capsys):
    arguments = flags(tmp_path, [*LINES, GOOD])
    assert check_command.main(arguments) == 0
    assert check_command.main([*arguments, "--strict"]) == 1
    assert "the same box 1,1,9,9 stands there before" in capsys.readouterr().out


def test_one_broken_file_does_not_hide_the_problems_of_the_other(tmp_path, capsys):
    arguments = flags(tmp_path, [*LINES, GOOD], LINES)
    (tmp_path / "val" / "data.csv").write_bytes(b"")
    assert check_command.main(arguments) == 1
    text = capsys.readouterr().out
    assert "val/data.csv: is empty" in text and "stands there before" in text


def test_training_stops_before_it_writes_anything(tmp_path, capsys):
    out_dir = tmp_path / "run"
    common = ["--depth", "18", "--weights", "none", "--out_dir", str(out_dir), "--device", "cpu"]
    assert train.main([*flags(tmp_path, [*LINES, "gone.png,1,1,9,9,circle"]), *common]) == 1
    assert "data.csv:4: there is no picture 'gone.png'" in capsys.readouterr().err
    assert train.main([*flags(tmp_path, [*LINES, GOOD]), "--strict", *common]) == 1
    assert "data.csv:4: the same box" in capsys.readouterr().err
    assert not out_dir.exists()


def test_training_is_told_of_warnings_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "handlers", [])  # a program before may have sent messages elsewhere
    monkeypatch.setattr(log, "propagate", True)
    data = CSVDataset(*write_csv_data(tmp_path, [*LINES, GOOD]))
    with caplog.at_level(logging.WARNING, "retinanet"):
        checks.check_before_training(data, None, strict=False)
    messages = [record.message.split(": ", 1)[1] for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == ["the same box 1,1,9,9 stands there before"]
    with pytest.raises(DataError):
        checks.check_before_training(data, None, strict=True)


def test_many_boxes_in_a_small_picture_are_no_problem(tmp_path):
    save(gradient(278, 400), tmp_path / "crowd.png")
    lines = [f"crowd.png,{x},{y},{x + 30},{y + 25},circle" for x in range(0, 345, 15) for y in range(0, 250, 50)]
    assert len(lines) == 115
    data = CSVDataset(*write_csv_data(tmp_path, lines))
    assert checks.check_dataset(data, "decode").counts == {"unused class": 2}
    assert data[0]["annot"].shape == (115, 5) and np.isfinite(data[0]["annot"]).all()


@pytest.mark.parametrize("header", ["image,left,top,width,height,label", "path,bbox_x,bbox_y,bbox_w,bbox_h,class"])
def test_a_header_that_names_a_width_is_fatal(tmp_path, header):
    assert csv_report(tmp_path, [header, *LINES]).errors() == ["looks like x, y, width, height"]


def test_one_number_above_one_does_not_hide_normalised_boxes(tmp_path):
    lines = [f"a.png,0.1,0.{digit},0.5,1,circle" for digit in range(1, 6)]
    report = csv_report(tmp_path, [*lines, "a.png,0,0,1.001,1,circle"])
    assert report.counts == {"looks normalised": 1}


def test_a_picture_that_is_listed_under_two_names_is_reported(tmp_path):
    lines = ["a.png,4,8,24,40,rectangle", "./a.png,30,10,60,40,circle", "b.png,1,1,9,9,triangle"]
    data = CSVDataset(*write_csv_data(tmp_path, lines))
    report = checks.check_dataset(data)
    assert report.counts == {"same image": 1}
    assert "data.csv:2: './a.png' stands there before" in report.text(["same image"])
