from pathlib import Path

import numpy as np
import pytest
from helpers import gradient, save, write_csv_data

from retinanet.data.checks import check_dataset
from retinanet.data.csv import CSVDataset
from retinanet.data.report import DataError
from retinanet.errors import UserError

GOOD = "a.png,1,1,9,9,circle"
LINES = [GOOD, "a.png,4,8,24,40,rectangle", "b.png,30,10,40,40,triangle"]


def csv_report(folder, lines):
    """The report about a CSV file with these lines, whether it can be read or not."""
    try:
        return check_dataset(CSVDataset(*write_csv_data(folder, lines)))
    except DataError as error:
        return error.report


def test_samples_by_hand(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path))
    assert len(data) == 2
    sample = data[0]
    assert sample["img"].shape == (48, 64, 3) and sample["img"].dtype == np.uint8
    assert sample["annot"].dtype == np.float32
    assert sample["annot"].tolist() == [[4, 8, 24, 40, 1], [30, 10, 60, 40, 0]]
    assert sample["index"] == 0
    assert data[1]["annot"].shape == (0, 5) and data[1]["img"].shape == (64, 48, 3)  # an image without objects
    assert data.labels == {0: "circle", 1: "rectangle", 2: "triangle"} and data.num_classes() == 3


def test_a_data_set_may_have_no_boxes(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path, ["a.png,,,,,", "b.png,,,,,"]))
    assert [data[index]["annot"].shape for index in (0, 1)] == [(0, 5), (0, 5)]


def test_the_lines_of_an_image_need_not_be_adjacent(tmp_path):
    lines = ["a.png,1,1,9,9,circle", "b.png,2,2,9,9,circle", "a.png,3,3,9,9,triangle"]
    data = CSVDataset(*write_csv_data(tmp_path, lines))
    assert data.annotations[:, 0].tolist() == [1, 3, 2] and data.image_index.tolist() == [0, 0, 1]
    assert [data.annotation_name(row)[-10:] for row in range(3)] == ["data.csv:1", "data.csv:3", "data.csv:2"]


def test_class_ids_may_come_in_any_order(tmp_path):
    data_file, class_file = write_csv_data(tmp_path)
    Path(class_file).write_text("triangle,2\ncircle,0\nrectangle,1\n")
    assert list(CSVDataset(data_file, class_file).labels.values()) == ["circle", "rectangle", "triangle"]


@pytest.mark.parametrize("text", ["\ufeff{}\n", "\n{}", "{}\r\n\r\n"])
def test_blank_lines_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path, text):
    data_file, class_file = write_csv_data(tmp_path)
    for path in (Path(data_file), Path(class_file)):
        lines = path.read_text().strip()
        path.write_bytes(text.format(lines if "\r" not in text else lines.replace("\n", "\r\n")).encode())
    data = CSVDataset(data_file, class_file)
    assert len(data) == 2 and data.num_classes() == 3 and data.report.counts == {}


def test_fields_may_be_quoted(tmp_path):
    assert csv_report(tmp_path, [*LINES, '"b.png",1,1,19,9,"circle"']).counts == {}


def test_relative_paths_start_at_the_folder_of_the_file_then_at_the_working_directory(tmp_path, monkeypatch):
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


def test_absolute_paths_are_taken_as_they_are(tmp_path):
    path = save(gradient(9, 11), tmp_path / "elsewhere.png")
    data = CSVDataset(*write_csv_data(tmp_path / "data", [f"{path},,,,,"]))
    assert data[0]["img"].shape == (9, 11, 3)


def test_a_missing_image_is_an_error_that_names_its_line(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path, ["a.png,,,,,", "a.png,1,1,2,2,circle", "gone.png,1,1,2,2,circle"]))
    for read in (lambda: data[1], lambda: data.image_sizes):
        with pytest.raises(UserError, match=r"data\.csv:3: .*gone\.png"):
            read()


# The original raised a NameError instead of these messages.
@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("a.png", "wrong column count", "expected `path,x1,y1,x2,y2,class_name`, found 1 columns"),
        ("a.png,1,1,9,circle", "wrong column count", "found 5 columns"),
        ("a.png,1,1,9,9,circle,7", "wrong column count", "found 7 columns"),
        ("a.png,1,one,9,9,circle", "not a number", "x1, y1, x2, y2 must be numbers, not 'one'"),
        ("a.png,1,,9,9,circle", "not a number", "must be numbers, not ''"),
        ("a.png,1,1,9,1_0,circle", "not a number", "not '1_0'"),
        ('a.png,1,"1,5",9,9,circle', "not a number", "use a decimal point"),
        ("a.png,1,1,9,inf,circle", "not finite", "found 1,1,9,inf"),
        ("a.png,-inf,1,9,9,circle", "not finite", "found -inf,1,9,9"),
        ("a.png,1,1,nan,9,circle", "not finite", "found 1,1,nan,9"),
        ("a.png,1,1,9,1000001,circle", "not finite", "at most 1,000,000"),
        ("a.png,9,1,9,9,circle", "sub-pixel box", "is less than 1 pixel wide or high: 9,1,9,9"),
        ("a.png,10,1,9,9,circle", "inverted box", "a box needs x1 < x2 and y1 < y2, or a width and height above 0"),
        ("a.png,1,9,9,3,circle", "inverted box", "found 1,9,9,3"),
        ("a.png,1,1,9,9,", "unknown class", "class '' is not in the class list (circle, rectangle, triangle)"),
        ("a.png,1,1,9,9,Circle", "unknown class", "did you mean 'circle'?"),
        ("a.png,1,1,9,9,rectagnle", "unknown class", "did you mean 'rectangle'?"),
        (",1,1,9,9,circle", "bad name", "path is empty"),
        ("x" * 1025 + ",1,1,9,9,circle", "bad name", "has 1,025 characters, more than 1,024"),
        ("gone.png,1,1,9,9,circle", "missing image", "image 'gone.png' does not exist"),
        (r"C:\data\a.png,1,1,9,9,circle", "missing image", "is it a Windows path?"),
        ("a.png,1,1,9,1.5,circle", "sub-pixel box", "1,1,9,1.5"),
        ("a.png,1.0,1,9,9,circle", "duplicate box", "1,1,9,9"),
        ("a.png,70,10,80,20,circle", "box outside", "70,10,80,20 in an image of 64 x 48"),
        ("a.png,50,10,80,20,circle", "box partly outside", "50,10,80,20 in an image of 64 x 48"),
        ("a.png,1,1,19,9, circle", "spaces", "' circle'"),
    ],
)
def test_a_bad_line_is_reported_with_its_number(tmp_path, line, kind, message):
    report = csv_report(tmp_path, [*LINES, line])
    (problem,) = report.examples[kind]
    assert problem.where == f"{tmp_path / 'data.csv'}:4" and message in problem.message
    assert report.counts == {kind: 1}


def test_a_repeated_box_is_dropped_whatever_its_spelling_but_not_in_another_image_or_class(tmp_path):
    lines = [GOOD, GOOD.replace("1,1", "1.0,1"), "a.png,1,1,9,9,triangle", "b.png,1,1,9,9,circle", GOOD]
    data = CSVDataset(*write_csv_data(tmp_path, lines))
    assert data.annotation_ids.tolist() == [1, 3, 4] and data.report.counts == {"duplicate box": 2}


def test_an_unclosed_quote_is_an_error_that_names_its_line(tmp_path):
    with pytest.raises(UserError, match=r"data\.csv:2: a quoted field continues on line 3"):
        CSVDataset(*write_csv_data(tmp_path, [GOOD, '"a.png,1,1,9,9,circle', 'a.png",1,1,9,9,circle']))
    with pytest.raises(UserError, match=r"data\.csv:3: is not a valid CSV file: quotes do not match"):
        CSVDataset(*write_csv_data(tmp_path, [GOOD, GOOD, '"a.png,1,1,9,9,circle']))


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_are_read_and_reported(tmp_path, separator):
    report = csv_report(tmp_path, [line.replace(",", separator) for line in LINES])
    assert report.counts == {"separator": 1}


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("filename,xmin,ymin,xmax,ymax,class", "header row"),
        ("path,x1,y1,x2,y2,class", "header row"),
        ("path,x,y,w,h,class", "looks like x, y, width, height"),
        ("image,left,top,width,height,label", "looks like x, y, width, height"),
        ("path,bbox_x,bbox_y,bbox_w,bbox_h,class", "looks like x, y, width, height"),
    ],
)
def test_a_header_is_skipped_or_fatal_if_it_names_other_columns(tmp_path, header, kind):
    report = csv_report(tmp_path, [header, *LINES])
    assert report.counts == {kind: 1} and report.examples[kind][0].where.endswith("data.csv:1")
    assert csv_report(tmp_path, [*LINES, header]).errors() == ["not a number"]


def test_widths_in_place_of_corners_are_recognised(tmp_path):
    lines = [f"a.png,{x},20,5,6,circle" for x in range(10, 20)]
    assert csv_report(tmp_path, lines).errors() == ["inverted box", "looks like x, y, width, height"]


@pytest.mark.parametrize(
    "lines",
    [
        ["a.png,0.1,0.2,0.5,1,circle", "a.png,0,0,1,1,circle"],
        [*(f"a.png,0.1,0.{digit},0.5,1,circle" for digit in range(1, 6)), "a.png,0,0,1.001,1,circle"],
    ],
)
def test_normalised_boxes_are_recognised(tmp_path, lines):
    assert csv_report(tmp_path, lines).counts == {"looks normalised": 1}


# Columns by name


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("image_path,xmin,xmax,ymin,ymax,label", "a.png,4,24,8,40,rectangle"),
        ("path,y1,x1,y2,x2,class", "a.png,8,4,40,24,rectangle"),
        ("Class Name,Right,Bottom,Top,Left,File Name,score", "rectangle,24,40,8,4,a.png,0.5"),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.png,64,48,rectangle,4,8,24,40"),
        ("label,class_name,image,x1,y1,x2,y2", "1,rectangle,a.png,4,8,24,40"),
    ],
)
def test_a_header_names_the_columns_in_any_order(tmp_path, header, line):
    data = CSVDataset(*write_csv_data(tmp_path, [header, line, header, line.replace("24", "25")]))
    assert data.annotations.tolist() == [[4, 8, 24, 40, 1], [4, 8, 25, 40, 1]]
    assert data.annotation_ids.tolist() == [2, 4] and data.report.counts == {"header row": 2}
    assert len(data.report.examples["header row"]) == 1


def test_unread_columns_are_named_and_declared_sizes_are_read(tmp_path):
    header = "filename,width,height,class,xmin,ymin,xmax,ymax,label,score"
    lines = [header, "a.png,64,48,circle,1,1,9,9,7,0.5", "b.png,48,64,circle,1,1,9,9,7,0.5"]
    data = CSVDataset(*write_csv_data(tmp_path, lines))
    assert data.report.examples["header row"][0].message.endswith("not read: 'label, score'")
    assert data.declared_sizes.tolist() == [[48, 64], [64, 48]]


@pytest.mark.parametrize(
    ("header", "lacking"),
    [
        ("filename,xmin,ymin,xmax,class", "has no column for y2 (such as ymax"),
        ("xmin,ymin,xmax,ymax,class", "has no column for path (such as image_path"),
        ("filename,xmin,ymin,xmax,ymax,score", "has no column for class_name"),
    ],
)
def test_a_header_that_lacks_columns_says_which(tmp_path, header, lacking):
    with pytest.raises(UserError) as error:
        CSVDataset(*write_csv_data(tmp_path, [header, *LINES]))
    assert lacking in str(error.value) and str(error.value).count("\n") == 0


def test_without_a_class_list_the_classes_are_those_of_the_file_sorted(tmp_path):
    data_file, _ = write_csv_data(
        tmp_path, ["a.png,1,1,9,9,b", "a.png,0,0,0,0,Z", "b.png,1,1,9,9,a", "b.png,2,2,8,8,b"]
    )
    data = CSVDataset(data_file)
    assert data.labels == {0: "a", 1: "b"} and data.annotations[:, 4].tolist() == [1, 0, 1]
    assert CSVDataset(data_file, class_names=["b", "c", "a"]).annotations[:, 4].tolist() == [0, 2, 0]


def test_problems_are_grouped_by_cause(tmp_path):
    lines = [*["a.png,1,1,9,9,star"] * 30, "a.png,1,1,9,9,moon", *["a.png,1,1,9,9"] * 30]
    report = csv_report(tmp_path, lines)
    assert report.counts["unknown class"] == 31 and report.counts["wrong column count"] == 30
    assert [(problem.cause, problem.count) for problem in report.examples["unknown class"]] == [
        ("star", 30),
        ("moon", 1),
    ]
    assert len(report.examples["wrong column count"]) == 1


# Images without objects, and images that are listed twice


@pytest.mark.parametrize(
    "line", ["b.png,0,0,0,0,circle", "b.png,nan,nan,nan,nan,nan", "b.png,,,,,circle", "b.png,NaN,,None,null,no class"]
)
def test_other_ways_to_write_no_objects_are_read_and_counted(tmp_path, line):
    data = CSVDataset(*write_csv_data(tmp_path, [GOOD, line, line.replace("b.png", "a.png")]))
    assert [len(data.load_annotations(index)) for index in (0, 1)] == [1, 0]
    assert data.report.counts == {"no objects": 2, "negative with boxes": 1}
    assert "path,,,,," in data.report.text(["no objects"])


def test_an_empty_line_beside_boxes_of_its_image_is_reported(tmp_path):
    report = CSVDataset(*write_csv_data(tmp_path, [GOOD, "b.png,,,,,", "a.png,,,,,"])).report
    assert report.counts == {"negative with boxes": 1}
    message = "data.csv:1: 'a.png' has lines with and without boxes; the boxes are used"
    assert str(report.examples["negative with boxes"][0]).endswith(message)


def test_different_paths_of_one_file_are_one_image(tmp_path):
    lines = [GOOD, "./a.png,2,2,8,8,circle", f"{tmp_path}/a.png,3,3,8,8,circle", "b.png,,,,,"]
    data = CSVDataset(*write_csv_data(tmp_path, lines))
    assert len(data) == 2 and data.offsets.tolist() == [0, 3, 3] and data.report.counts == {"repeated image": 2}


# The class list


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("circle,0\nrectangle\n", r"classes\.csv:2: expected `class_name,id`, found 1 columns"),
        ("circle,0\ntriangle,two\n", r"classes\.csv:2: the class id must be a whole number, not 'two'"),
        ("circle,0\ntriangle,-1\n", r"classes\.csv:2: the class id must be a whole number, not '-1'"),
        ("0,circle\n", r"classes\.csv:1: .*are the two columns swapped"),
        ("circle,0\ncircle,1\n", r"classes\.csv:2: class 'circle' .* is repeated"),
        ("circle,0\ntriangle,0\n", r"classes\.csv:2: .* its id 0 is repeated"),
        ("circle,1\ntriangle,2\n", r"classes\.csv: class ids must run from 0 without gaps, found \[1, 2\]"),
        ("circle,0\nrectangle\nstar,0\n", r"class list \(fatal\): 2\n.*:2: expected.*\n.*:3: .* is repeated"),
        ("", r"classes\.csv: is empty"),
    ],
)
def test_a_bad_class_list_is_an_error_that_lists_its_lines(tmp_path, text, message):
    data_file, class_file = write_csv_data(tmp_path)
    Path(class_file).write_text(text)
    with pytest.raises(UserError, match=message):
        CSVDataset(data_file, class_file)


def test_a_header_of_the_class_list_is_skipped(tmp_path):
    data_file, class_file = write_csv_data(tmp_path)
    Path(class_file).write_text("class_name,id\n" + Path(class_file).read_text())
    assert CSVDataset(data_file, class_file).report.counts == {"header row": 1}


def test_files_that_are_missing_empty_or_not_text_are_errors(tmp_path):
    data_file, class_file = write_csv_data(tmp_path)
    for files in ((tmp_path / "no.csv", class_file), (data_file, tmp_path / "no.csv")):
        with pytest.raises(UserError, match=r"no\.csv: cannot be read"):
            CSVDataset(*files)
    with pytest.raises(UserError, match=r"a\.png:1: is not in UTF-8"):
        CSVDataset(tmp_path / "a.png", class_file)
    for content, message in (
        (b"\n", ": is empty"),
        (b"\xff\xfea", ": is in UTF-16"),
        (b"a\n\0", ":2: holds a zero byte"),
    ):
        Path(data_file).write_bytes(content)
        with pytest.raises(UserError, match=rf"data\.csv{message}"):
            CSVDataset(data_file, class_file)


def test_a_few_bad_boxes_are_not_taken_for_widths_and_heights(tmp_path):
    good = [f"a.png,{x},2,{x + 20},9,circle" for x in range(30)]
    flat = ["a.png,5,5,5,40,circle", "a.png,6,7,6,30,circle"]
    assert csv_report(tmp_path, good + flat).counts == {"sub-pixel box": 2, "unused class": 2}
    inverted = [line.replace("5,5,5,", "5,5,4,").replace("6,7,6,", "6,7,5,") for line in flat]
    assert csv_report(tmp_path, good + inverted).errors() == ["inverted box"]


def test_images_without_objects_add_no_class(tmp_path):
    lines = [GOOD, "b.png,-1,-1,-1,-1,none", "c.png,nan,nan,nan,nan,nan", "d.png,,,,,nan"]
    data = CSVDataset(write_csv_data(tmp_path, lines)[0])
    assert len(data) == 4 and data.labels == {0: "circle"} and len(data.annotations) == 1


def test_declared_sizes_may_be_floats_have_spaces_or_come_later(tmp_path):
    header = "filename,width,height,class,xmin,ymin,xmax,ymax"
    lines = [header, "a.png,,48,circle,1,1,9,9", "a.png,64.0, 48 ,circle,2,1,9,9", "b.png,48px,64,circle,1,1,9,9"]
    data = CSVDataset(*write_csv_data(tmp_path, lines))
    assert data.declared_sizes.tolist() == [[48, 64], [0, 0]]
    (problem,) = data.report.examples["declared size"]
    assert problem.where.endswith("data.csv:4") and problem.count == 1


def test_an_empty_class_list_is_explained_by_a_training_set_without_boxes(tmp_path):
    data_file, _ = write_csv_data(tmp_path)
    with pytest.raises(DataError, match="because the training set has no boxes"):
        CSVDataset(data_file, class_names=[])
