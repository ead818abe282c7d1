import logging

import pytest
from helpers import gradient, save, truncate, write_csv_data

import train
from retinanet.data import checks
from retinanet.data.csv import CSVDataset
from retinanet.data.report import DataError, Report
from retinanet.data.shapes import ShapesDataset
from retinanet.process import log

GOOD = "a.png,1,1,9,9,circle"
LINES = [GOOD, "a.png,4,8,24,40,rectangle", "b.png,30,10,40,40,triangle"]


def counts_of(folder, lines, depth="quick"):
    """The problems in a CSV file of these lines."""
    return checks.check_dataset(CSVDataset(*write_csv_data(folder, lines)), depth).counts


def places(report, kind):
    """The examples of a kind: lines after the file's name."""
    return [problem.where.split("data.csv")[1] for problem in report.examples.get(kind, [])]


def test_good_data_have_no_problems(tmp_path):
    assert counts_of(tmp_path, LINES, "decode") == {}
    assert checks.check_dataset(ShapesDataset(20)).counts == {}


def test_boxes_within_a_pixel_of_the_border_are_not_reported(tmp_path):
    assert counts_of(tmp_path, [*LINES, "a.png,-0.5,0,64.5,48.9,circle"]) == {}


def test_many_boxes_in_a_small_image_are_no_problem(tmp_path):
    save(gradient(278, 400), tmp_path / "crowd.png")
    lines = [f"crowd.png,{x},{y},{x + 30},{y + 25},circle" for x in range(0, 345, 15) for y in range(0, 250, 50)]
    assert len(lines) == 115 and counts_of(tmp_path, lines, "decode") == {"unused class": 2}


def test_swapped_boxes_are_recognised(tmp_path):
    # a.png is 64 wide and 48 high: these are good as y1, x1, y2, x2.
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


def test_broken_images_are_found_by_looking_closely_enough(tmp_path):
    files = write_csv_data(tmp_path, LINES)
    truncate(tmp_path / "a.png")  # its header is whole
    (tmp_path / "b.png").write_text("not an image")
    found = {}
    for depth in checks.DEPTHS:
        report = checks.check_dataset(CSVDataset(*files), depth, workers=2)
        found[depth] = places(report, "unreadable image")
    assert found == {"none": [], "quick": [":3"], "headers": [":3"], "decode": [":1", ":3"]}


def test_the_cheap_check_spares_the_sampler_reading_headers_again(tmp_path):
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
    files = write_csv_data(tmp_path, ["a.png,4,8,24,40,rectangle", "c.png,30,10,60,40,circle", "b.png,1,1,9,9,triangle"])
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
    monkeypatch.setattr(log, "handlers", [])  # a program before may have sent messages elsewhere
    monkeypatch.setattr(log, "propagate", True)
    data = CSVDataset(*write_csv_data(tmp_path, [*LINES, GOOD]))
    with caplog.at_level(logging.WARNING, "retinanet"):
        checks.check_before_training(data, None, strict=False)
    messages = [record.message.split(": ", 1)[1] for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == ["repeats a box of the same image and class: 1,1,9,9"]
    with pytest.raises(DataError):
        checks.check_before_training(data, None, strict=True)
