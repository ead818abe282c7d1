import os

import numpy as np
import pytest

from retinanet.data import reading
from retinanet.data.checks import check_dataset
from retinanet.data.classes import read_class_list
from retinanet.data.csv import CSVDataset
from retinanet.data.images import read_header, read_image
from retinanet.data.reading import check_boxes, load_json, read_bytes, read_text
from retinanet.data.report import Report
from retinanet.errors import UserError

READERS = (read_bytes, read_text, load_json, read_image, read_header)


@pytest.mark.parametrize("read", READERS)
def test_only_regular_files_are_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "zero").symlink_to("/dev/zero")  # reading it would never end
    for name in ("pipe", "zero", ".", "missing", "a\0b"):
        with pytest.raises(UserError, match=r"is not a file|cannot be read"):
            read(tmp_path / name)


def test_the_bytes_that_are_read_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "a.txt") == b"0123456789"
    (tmp_path / "a.txt").write_bytes(b"0123456789\n")
    for read in (read_bytes, read_text, load_json):
        with pytest.raises(UserError, match=r"a\.txt: has more than 10 bytes"):
            read(tmp_path / "a.txt")


def test_data_sets_refuse_pipes_instead_of_files(tmp_path):
    for name in ("data.csv", "image.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "classes.csv").write_text("car,0\n")
    with pytest.raises(UserError, match=r"data\.csv: cannot be read \(it is not a file"):
        CSVDataset(tmp_path / "data.csv", tmp_path / "classes.csv")
    (tmp_path / "good.csv").write_text("image.png,1,1,9,9,car\n")
    report = check_dataset(CSVDataset(tmp_path / "good.csv", tmp_path / "classes.csv"), "decode")
    assert report.errors() == ["missing image"]


def test_a_class_list_has_one_name_per_line(tmp_path):
    path = tmp_path / "classes.txt"
    assert read_class_list(path) is None
    path.write_text("\ufeffcar\n traffic light \n\n")
    assert read_class_list(path) == ["car", "traffic light"]
    for text in ("", "car\ncar\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="one class name per line, without repeats"):
            read_class_list(path)
    path.write_text("car\n\nbus\n")  # tools differ on whether a blank line counts
    with pytest.raises(UserError, match=r"classes\.txt:2: is blank"):
        read_class_list(path)


def kept(*boxes, labels=None, image_index=None):
    """Which boxes are kept, and the report."""
    report, number = Report(), len(boxes)
    labels = np.zeros(number, int) if labels is None else np.array(labels)
    image_index = np.zeros(number, int) if image_index is None else np.array(image_index)
    mask = check_boxes(
        report, np.column_stack([np.array(boxes, float), labels]), image_index, lambda row: f"line {row}"
    )
    return mask.tolist(), report


def test_each_kind_of_bad_box_is_recognised():
    good = (1, 1, 5, 5)
    mask, report = kept(good, (5, 1, 1, 5), (1, 1, 1, 5), (1, 1, 1.5, 5), (np.nan, 1, 5, 5), (0, 0, 1e7, 5), good)
    assert mask == [True] + [False] * 6
    assert report.counts == {"not finite": 2, "inverted box": 1, "sub-pixel box": 2, "duplicate box": 1}
    mask, report = kept(good, good, good, labels=[0, 1, -1], image_index=[0, 0, 0])
    assert mask == [True, True, False] and report.counts == {}  # -1: an unknown class, which is reported elsewhere
    assert kept(good, good, image_index=[0, 1])[0] == [True, True]


def test_fractions_instead_of_pixels_are_fatal_if_all_are_and_a_guess_otherwise():
    fractions = [(0.1, 0.1, 0.5, 0.5 + n / 10) for n in range(5)]
    mask, report = kept(*fractions, (0, 0, 1.001, 1))
    assert report.errors() == ["looks normalised"] and "6 of 6 boxes, such as 0.1,0.1,0.5,0.5" in report.text(
        report.counts
    )
    mask, report = kept(*fractions, (1, 1, 50, 50))
    assert report.errors() == [] and report.counts == {"guess": 1, "sub-pixel box": 5} and mask == [False] * 5 + [True]
    assert "a guess: 5 of 6 boxes" in report.text(["guess"])
    assert kept((0, 0, 1, 1), (0, 0, 9, 9), (1, 1, 9, 9))[1].counts == {}
