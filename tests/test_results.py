import csv
import json

import pytest
from helpers import detections, write_csv_data

import train
from retinanet import detection
from retinanet.data.csv import CSVDataset
from retinanet.errors import UserError
from retinanet.evaluation import report
from retinanet.results import check_csv, counts_path, write_csv, write_page

FOUND = [
    ('a "big", one.tif', detections((0.9, 1, 1, 2, 30.126, 40), (0.25, 0, 5, 6, 7, 8))),
    ("none.png", detections()),
    ("\udcff.png", detections((0.5, 1, 0, 0, 1, 1))),
]


def read(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_the_tables_have_a_line_per_detection_and_per_image(tmp_path):
    path = tmp_path / "new" / "trees.csv"
    check_csv(path)
    write_csv(path, FOUND, ["oak, old", "elm"])
    assert read(path) == [
        ["file", "class", "score", "x1", "y1", "x2", "y2"],
        ['a "big", one.tif', "elm", "0.9", "1.0", "2.0", "30.13", "40.0"],
        ['a "big", one.tif', "oak, old", "0.25", "5.0", "6.0", "7.0", "8.0"],
        ["\udcff.png", "elm", "0.5", "0.0", "0.0", "1.0", "1.0"],
    ]
    assert counts_path(path).name == "trees_counts.csv" and read(counts_path(path)) == [
        ["file", "oak, old", "elm", "all"],
        ['a "big", one.tif', "1", "1", "2"],
        ["none.png", "0", "0", "0"],
        ["\udcff.png", "0", "1", "1"],
    ]
    check_csv(path)  # its own files may be replaced
    write_csv(path, FOUND[1:2], ["elm"])
    assert len(read(path)) == 1 and len(read(counts_path(path))) == 2


def test_other_files_are_spared(tmp_path):
    (tmp_path / "train.csv").write_text("a.png,1,2,3,4,elm\n")
    (tmp_path / "x_counts.csv").write_text("notes")
    (tmp_path / "folder.csv").mkdir()
    for name in ("train.csv", "x.csv", "folder.csv"):
        with pytest.raises(UserError, match="exists and"):
            check_csv(tmp_path / name)
    with pytest.raises(UserError, match="nothing can be written there"):
        check_csv(tmp_path / "train.csv" / "x.csv")
    assert (tmp_path / "train.csv").read_text().startswith("a.png")
    assert not (tmp_path / "x.csv").exists()


SMALL = ["--dataset", "shapes", "--shapes_train", "2", "--shapes_val", "2", "--min_side", "64", "--depth", "18"]
FLAGS = [*SMALL, "--weights", "none", "--recipe", "scratch", "--epochs", "1", "--batch_size", "2", "--workers", "0"]


@pytest.mark.usefixtures("small_network")
def test_training_writes_a_report_and_survives_its_errors(tmp_path, capsys, monkeypatch):
    detect, flags, calls = detection.detect, [*FLAGS, "--out_dir", str(tmp_path)], []
    monkeypatch.setattr(detection, "detect", lambda *args, **limits: calls.append(1) or detect(*args, **limits))
    assert train.main(flags) == 0
    pictures = ("labels.png", "batch.png", "detections.png", "curves.png")
    assert all((tmp_path / name).stat().st_size for name in pictures)
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "best.pt") in page and 'id="training"' in page and "The anchors' reach" in page
    assert train.main([*flags, "--resume", "auto"]) == 0 and len(calls) == 1  # no second detection
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    capsys.readouterr()
    assert train.main([*flags, "--resume", "auto"]) == 0
    assert "warning: no report.html: " in capsys.readouterr().out and len(calls) == 2


@pytest.mark.parametrize("log", [None, "", '{"epoch": 0, "class_loss": 1.0}\n{"epoch"'])
def test_what_is_unknown_is_left_out(tmp_path, log, filled_net):
    dataset = CSVDataset(*write_csv_data(tmp_path / "data"))
    evaluation = report.Evaluation(dataset, {0: detections([0.9, 1, 4, 8, 24, 40]), 1: detections()})
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    source = str(tmp_path / "best.pt")
    write_page(tmp_path / "report.html", evaluation, source, (filled_net, {"min_side": 64, "max_side": 64}))
    page = (tmp_path / "report.html").read_text()
    assert ('id="training"' in page) == bool(log) and "<dt>Model</dt>" in page and "The anchors' reach" in page
    (tmp_path / "data" / "a.png").unlink()
    fresh = CSVDataset(*(str(tmp_path / "data" / name) for name in ("data.csv", "classes.csv")))
    evaluation = report.Evaluation(fresh, evaluation.detections)
    write_page(tmp_path / "report.html", evaluation, str(tmp_path / "found.json"), None)
    page = (tmp_path / "report.html").read_text()
    assert "the model is not known" in page and 'id="training"' not in page and "anchors' reach" not in page
    content = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [image["file"] for image in content["images"]].count(None) == 1
