import json

import pytest
from helpers import detections, write_csv_data

import train
from retinanet import detection
from retinanet.commands.page import write_page
from retinanet.data.csv import CSVDataset
from retinanet.evaluation import report
from retinanet.model import ARCHITECTURES
from retinanet.resnet import BasicBlock

SMALL = ["--dataset", "shapes", "--shapes_train", "2", "--shapes_val", "2", "--min_side", "64", "--depth", "18"]
FLAGS = [*SMALL, "--weights", "none", "--recipe", "scratch", "--epochs", "1", "--batch_size", "2", "--workers", "0"]


def test_a_training_ends_with_its_report_and_not_with_an_error_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, 18, (BasicBlock, (1, 1, 1, 1)))
    detect, flags, calls = detection.detect, [*FLAGS, "--out_dir", str(tmp_path)], []
    monkeypatch.setattr(detection, "detect", lambda *args, **limits: calls.append(1) or detect(*args, **limits))
    assert train.main(flags) == 0
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "best.pt") in page and 'id="training"' in page and "The anchors' reach" in page
    assert train.main([*flags, "--resume", "auto"]) == 0 and len(calls) == 1  # what the validation found is used
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    capsys.readouterr()
    assert train.main([*flags, "--resume", "auto"]) == 0
    assert "warning: no report.html: " in capsys.readouterr().out and len(calls) == 2


@pytest.mark.parametrize("log", [None, "", '{"epoch": 0, "class_loss": 1.0}\n{"epoch"'])
def test_what_is_unknown_is_left_out(tmp_path, log, filled_net):
    dataset = CSVDataset(*write_csv_data(tmp_path / "data"))
    evaluation = report.evaluate(dataset, {0: detections([0.9, 1, 4, 8, 24, 40]), 1: detections()})
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    source = str(tmp_path / "best.pt")
    write_page(tmp_path / "report.html", evaluation, source, (filled_net, {"min_side": 64, "max_side": 64}))
    page = (tmp_path / "report.html").read_text()
    assert ('id="training"' in page) == bool(log) and "<dt>Model</dt>" in page and "The anchors' reach" in page
    (tmp_path / "data" / "a.png").unlink()
    fresh = CSVDataset(*(str(tmp_path / "data" / name) for name in ("data.csv", "classes.csv")))
    evaluation = report.evaluate(fresh, evaluation.detections)
    write_page(tmp_path / "report.html", evaluation, str(tmp_path / "found.json"), None)
    page = (tmp_path / "report.html").read_text()
    assert "the model is not known" in page and 'id="training"' not in page and "anchors' reach" not in page
    content = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [image["file"] for image in content["images"]].count(None) == 1
