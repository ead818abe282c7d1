import csv

import pytest
from helpers import detections

from retinanet.commands.save_csv import check_csv, counts_path, write_csv
from retinanet.errors import UserError

FOUND = [
    ('a "big", one.tif', detections((0.9, 1, 1, 2, 30.126, 40), (0.25, 0, 5, 6, 7, 8))),
    ("none.png", detections()),
    ("\udcff.png", detections((0.5, 1, 0, 0, 1, 1))),
]


def read(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_a_line_a_detection_and_a_line_an_image(tmp_path):
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
