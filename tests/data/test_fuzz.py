"""Randomly broken files: each is read correctly, or rejected with a UserError that names it.

In each test, at least a share of the files must be read and a share rejected. Annotation files are also read with bad
entries left out, and what remains must be right, too.

A sample runs with the other tests. To run all examples, in less than a minute:
`FUZZ=all python -m pytest tests/data/test_fuzz.py`.
"""

import contextlib
import copy
import csv
import faulthandler
import io
import json
import math
import os
import pickle
import re
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import CLASSES, coco_content, gradient, write_coco_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet.data.checks import check_dataset
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.images import read_header, read_image
from retinanet.data.report import Report
from retinanet.errors import UserError
from retinanet.training import checkpoint

HANG = 10  # seconds
OUTCOMES = Counter()  # numbers of files in one test that were "read" or "rejected"
LEAST = 0.02  # minimum share of the files for each outcome
HOSTILE = [
    "", " ", "nan", "inf", "-inf", "1e999", "1e30", "-5", "0", "0.5", "1_0", "٣", "0x10", "1,5", '"', '"a', 'a"b',
    '"a,b"', "\t", ";", "\0", "é", "x" * 2000, "None", " 7 ", "a.png ", "Circle", "rectangel", "#a=b c.png",
    "C:\\data\\a.png", "\u2028", "\r", "\n", "\\", "../a.png", "/dev/zero", "99999999999999999999",
    "7.000000001", "+8", ".5", "5.", "1e1", '"7"', "circle", "triangle", "c d.png", "3", "70", "7.25",
]  # fmt: skip


def fuzz(examples):
    """Settings of a fuzz test: a sample of its examples, always the same, or all of them, new in each run."""
    everything = os.environ.get("FUZZ") == "all"
    return settings(
        max_examples=examples if everything else examples // 40,
        derandomize=not everything,
        database=None,
        deadline=HANG * 1000,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def outcomes():
    """Make sure that both outcomes occurred; otherwise a test would show nothing."""
    OUTCOMES.clear()
    yield
    assert min(OUTCOMES["read"], OUTCOMES["rejected"]) >= max(1, LEAST * OUTCOMES.total()), OUTCOMES


@contextlib.contextmanager
def no_hang():
    """End the whole run if an example hangs."""
    faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd images
        yield
    faulthandler.cancel_dump_traceback_later()


def answer(path, read):
    """What `read` returns; None if it raises a UserError that names one of the files."""
    with no_hang():
        try:
            result = read()
        except UserError as error:
            assert str(path) in str(error) and len(str(error)) < 100_000
            OUTCOMES["rejected"] += 1
            return None
    OUTCOMES["read"] += 1
    return result


@st.composite
def broken_bytes(draw, content):
    """Bytes of which some were flipped, removed, inserted or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        action = draw(st.sampled_from(["flip", "set", "insert", "delete", "truncate", "zero"]))
        if action == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "set" and content:
            content[place] = draw(st.integers(0, 255))
        elif action == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        elif action == "delete":
            del content[place : place + draw(st.integers(1, 20))]
        elif action == "truncate":
            del content[place:]
        elif action == "zero":
            content[place : place + 8] = bytes(len(content[place : place + 8]))
    return bytes(content)


# CSV

NUMBER = st.one_of(st.integers(0, 60).map(str), st.floats(-10, 70).map(str))
ROW = st.tuples(
    st.sampled_from(["a.png", "b.png", "c d.png"]), NUMBER, NUMBER, NUMBER, NUMBER, st.sampled_from(CLASSES)
)


def in_order(row):
    """The row with x1 < x2 and y1 < y2, so that most files are good before they are broken."""
    name, *numbers, label = row
    x1, y1, x2, y2 = map(float, numbers)
    return [name, *(f"{number!r}" for number in (min(x1, x2), min(y1, y2), max(x1, x2) + 2, max(y1, y2) + 2)), label]


@st.composite
def broken_csv(draw, rows):
    """Rows of fields -> the bytes of a CSV file that is more or less broken."""
    rows = [list(row) for row in rows]
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.sampled_from(rows)) if rows else []
        column = draw(st.integers(0, max(0, len(row) - 1)))
        action = draw(st.sampled_from(["replace", "delete", "double", "line", "header", "negative", "drop"]))
        if action == "replace" and row:
            row[column] = draw(st.sampled_from(HOSTILE))
        elif action == "delete" and row:
            del row[column]
        elif action == "double" and row:
            row.insert(column, row[column])
        elif action == "line":
            rows.insert(draw(st.integers(0, len(rows))), list(row))
        elif action == "header":
            rows.insert(draw(st.integers(0, len(rows))), ["path", "x1", "y1", "x2", "y2", "class"][: len(row)])
        elif action == "negative":
            rows.append(["d.png", *[""] * (len(row) - 1)])
        elif action == "drop" and rows:
            rows.remove(row)
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = end.join(draw(st.sampled_from([*",,,,;\t"])).join(row) for row in rows) + end
    encoding = draw(st.sampled_from([*["utf-8"] * 8, "utf-8-sig", "utf-16", "latin-1"]))
    content = text.encode(encoding, errors="replace")
    return draw(broken_bytes(content)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def csv_files(draw):
    rows = [in_order(row) for row in draw(st.lists(ROW, min_size=1, max_size=6))]
    classes = [[name, str(label)] for label, name in enumerate(CLASSES)]
    good = "\n".join(",".join(row) for row in classes).encode()
    return draw(broken_csv(rows)), draw(st.one_of(st.just(good), st.just(good), st.just(good), broken_csv(classes)))


def fields_of(content):
    """The stripped fields of each line, by line number from 1, read in another way than the library's."""
    lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig"))
    first = next(line for line in lines if line.strip())
    fits = {sign: (first.count(sign) == 5, sum(line.count(sign) == 5 for line in lines)) for sign in ",;\t"}
    separator = max(fits, key=lambda sign: (*fits[sign], first.count(sign)))
    rows = [next(csv.reader([line], delimiter=separator), []) for line in lines]
    return {number: [field.strip() for field in row] for number, row in enumerate(rows, start=1)}


@fuzz(2000)
@given(csv_files())
def test_csv_files(tmp_path_factory, files):
    folder = tmp_path_factory.getbasetemp() / "csv"
    folder.mkdir(exist_ok=True)
    for name, content in zip(("data.csv", "classes.csv"), files, strict=True):
        (folder / name).write_bytes(content)
    for report in (Report(), Report(skip_bad=True)):
        data = answer(
            folder, lambda report=report: CSVDataset(folder / "data.csv", folder / "classes.csv", report=report)
        )
        if data is not None:
            check_csv(data, files[0], folder)


def check_csv(data, content, folder):
    """Compare a data set with its file."""
    assert np.isfinite(data.annotations).all() and (data.annotations[:, 2:4] - data.annotations[:, :2] > 0).all()
    lines = fields_of(content)
    for row, line, index in zip(data.annotations, data.annotation_ids, data.image_index, strict=True):
        name, *numbers, label = lines[line]
        np.testing.assert_array_equal(row[:4], np.array([float(number) for number in numbers], dtype=np.float32))
        assert data.label_to_name(int(row[4])) == label and data.image_files[index] == name
    places = [problem.where for problem in data.report.examples.get("header row", [])]
    headers = [lines[int(where.rsplit(":", 1)[1])] for where in places if "data.csv" in where]
    rows = {number: row for number, row in lines.items() if row not in headers and any(row)}
    left_out = sum(data.report.counts.get(kind, 0) for kind in ("sub-pixel box", "duplicate box"))
    left_out += sum(map(has_no_box, rows.values())) + len({where for where, _ in data.report.skipped})
    assert len(data.annotations) + left_out >= len(rows)
    if not data.report.skipped:
        assert len(data.annotations) + left_out == len(rows)
        assert set(data.image_files.tolist()) == {row[0] for row in rows.values()}
    answer(folder, lambda: check_dataset(data, "none").raise_errors())


def has_no_box(row):
    """Whether a line stands for an image without objects."""
    try:
        numbers = [float(field or "nan") for field in row[1:5]]
    except ValueError:
        return False
    return len(row) == 6 and (all(map(math.isnan, numbers)) or not any(numbers))


# COCO

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 120),
    st.sampled_from([2**53, 2**63, 10**400, -1, 0, 0.5, 1e300, math.nan, math.inf, -math.inf]),
    st.sampled_from(["", "7", "a.png", "../a.png", "/dev/zero", "\0", "\ud800", "é#= .png", "x" * 5000]),
    st.sampled_from([[], {}, [1, 2, 3], [[1, 2, 3, 4]], {"id": 1}, [1, 1, 5, 5], [1, 1, -5, 5], [1, 1, 0.2, 5]]),
)


@st.composite
def coco_files(draw):
    """The bytes of a COCO file that is more or less broken."""
    content = coco_content()
    for _ in range(draw(st.integers(0, 3))):
        parent, key = {"": content}, ""
        for _ in range(draw(st.integers(0, 4))):
            value = parent[key]
            if not isinstance(value, dict | list) or not value:
                break
            parent = value
            key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        action = draw(st.sampled_from(["replace", "replace", "delete", "double"]))
        if parent is not content and key == "":
            break
        if action == "replace":
            parent[key] = copy.deepcopy(draw(VALUES))  # the values are shared between examples
        elif action == "delete":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key])
        content = content if isinstance(content, dict) else {}
    text = json.dumps(content)
    wrapping = draw(st.sampled_from(["", "", "", "", "twice", "deep", "cut", "broken", "comment"]))
    if wrapping == "twice":
        text += "\n" + text
    elif wrapping == "deep":
        sign, end = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
        depth = draw(st.sampled_from([5, 500, 100_000]))
        text = text[:-1] + ', "deep": ' + sign * depth + "1" + end * depth + "}"
    elif wrapping == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif wrapping == "comment":
        text = "// made by hand\n" + text
    data = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"])))
    return draw(broken_bytes(data)) if wrapping == "broken" else data


@fuzz(1000)
@given(coco_files())
def test_coco_files(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "coco"
    if not folder.exists():
        write_coco_data(folder)
    (folder / "annotations" / "instances_val2017.json").write_bytes(content)
    for report in (Report(), Report(skip_bad=True)):
        data = answer("instances_val2017.json", lambda report=report: CocoDataset(folder, "val2017", report=report))
        if data is not None:
            check_coco(data, json.loads(content), folder)


def check_coco(data, parsed, folder):
    """Compare a data set with the content of its file."""
    assert np.isfinite(data.annotations).all() and (data.annotations[:, 2:4] - data.annotations[:, :2] > 0).all()
    expected = set()
    for entry in parsed["annotations"]:
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # malformed: skipped
            x, y, width, height = entry["bbox"]
            if not entry.get("iscrowd") and width >= 1 and height >= 1:
                label = data.coco_label_to_label(entry["category_id"])
                row = np.array([x, y, x + width, y + height, label], dtype=np.float32)
                expected.add((data.image_ids.index(entry["image_id"]), entry["id"], *row.tolist()))
    found = zip(data.image_index.tolist(), data.annotation_ids.tolist(), data.annotations.tolist(), strict=True)
    found = {(index, entry, *row) for index, entry, row in found}
    truth = data.coco
    assert 0 not in truth.anns and all(math.isfinite(entry["area"]) for entry in truth.anns.values())
    assert found <= expected
    if not data.report.skipped:
        assert found == expected and len(truth.anns) == len(parsed["annotations"])
        assert sorted(data.image_ids) == sorted(image["id"] for image in parsed["images"])
    answer(folder, lambda: check_dataset(data, "headers").raise_errors())


# Images


def image_files():
    """Good files of all kinds, by name."""
    smooth = Image.fromarray(gradient(24, 40))
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("a.jpg", smooth, {"exif": exif}),
        ("b.jpg", Image.fromarray(noise), {"progressive": True}),
        ("c.jpg", smooth.convert("CMYK"), {}),
        ("a.png", smooth, {"exif": exif}),
        ("b.png", smooth.convert("P"), {}),
        ("c.png", Image.fromarray(noise[..., 0].astype(np.uint16) * 200), {}),
        ("a.gif", smooth, {}),
        ("a.bmp", smooth, {}),
        ("a.tif", smooth, {"compression": "tiff_lzw", "exif": exif}),
        ("b.tif", Image.fromarray(noise), {}),
        ("a.webp", smooth, {}),
        ("a.ppm", smooth, {}),
    ]
    files = {}
    for name, image, options in kinds:
        buffer = io.BytesIO()
        formats = {"jpg": "JPEG", "tif": "TIFF"}
        image.save(buffer, formats.get(name[2:], name[2:].upper()), **options)
        files[name] = buffer.getvalue()
    return files


IMAGES = image_files()


@st.composite
def broken_images(draw):
    name, other = draw(st.sampled_from(sorted(IMAGES))), draw(st.sampled_from(sorted(IMAGES)))
    content = draw(broken_bytes(IMAGES[name]))
    if draw(st.integers(0, 9)) == 0:
        content = content[: len(content) // 2] + IMAGES[other]
    return draw(st.sampled_from([name, name, other, "name with # and = é.jpg", "no suffix"])), content


@fuzz(500)
@given(broken_images())
def test_images(tmp_path_factory, file):
    name, content = file
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    header = answer(path, lambda: read_header(path))
    image = answer(path, lambda: read_image(path))
    if image is not None:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert header[:2] == image.shape[:2]
        if content in IMAGES.values():
            expected = Image.open(io.BytesIO(content)).size
            assert sorted(image.shape[:2]) == sorted(expected)


# Checkpoints


def checkpoints(folder):
    """A checkpoint, its bytes in both of torch's formats, and the bytes of other kinds of files."""
    content = {"model": {"weight": torch.arange(600.0).reshape(20, 30), "bias": torch.ones(7)}, "class_names": ["a"]}
    checkpoint.save(folder / "good.pt", content)
    old, arrays = io.BytesIO(), io.BytesIO()
    torch.save(content, old, _use_new_zipfile_serialization=False)
    np.savez(arrays, weight=np.ones(3))
    foreign = [
        arrays.getvalue(),
        pickle.dumps(content["class_names"]),
        pickle.dumps(os.system),
        b"text\n",
        b"",
        b"PK\3\4",
    ]
    return content, [(folder / "good.pt").read_bytes(), old.getvalue(), *foreign, *IMAGES.values()]


def same(found, content):
    """Whether two checkpoints are equal bit for bit."""
    if isinstance(content, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, content)
    if isinstance(content, dict):
        return (
            isinstance(found, dict) and [*found] == [*content] and all(same(found[key], content[key]) for key in found)
        )
    return found == content


@fuzz(200)
@given(data=st.data())
def test_checkpoints(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "checkpoints"
    folder.mkdir(exist_ok=True)
    good, files = checkpoints(folder)
    kind = data.draw(st.sampled_from([0] * 12 + list(range(1, len(files)))))
    (folder / "broken.pt").write_bytes(data.draw(broken_bytes(files[kind])))
    found = answer(folder / "broken.pt", lambda: checkpoint.load(folder / "broken.pt"))
    if kind == 0:
        assert found is None or same(found, good)
    else:  # torch's old format has no checksums
        assert found is None or isinstance(found, dict)
