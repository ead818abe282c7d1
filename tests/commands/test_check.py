from helpers import coco_content, write_coco_data, write_csv_data

from retinanet.commands import check

GOOD = "a.png,1,1,9,9,circle"
LINES = [GOOD, "a.png,4,8,24,40,rectangle", "b.png,30,10,40,40,triangle"]


def flags(folder, lines, val_lines=None):
    data, classes = write_csv_data(folder, lines)
    found = ["--dataset", "csv", "--csv_train", data, "--csv_classes", classes]
    return found if val_lines is None else [*found, "--csv_val", write_csv_data(folder / "val", val_lines)[0]]


def test_the_program_lists_errors_and_warnings_apart(tmp_path, capsys):
    bad = [*LINES, "a.png,1,1,9,9,dog", "gone.png,1,1,9,9.5,circle", "a.png,1,1,2,1.1,circle"]
    assert check.main(flags(tmp_path, LINES, bad)) == 1
    text = capsys.readouterr().out
    warnings, errors = text.split("\nerrors:\n")
    assert "data.csv: 2 images, 0 of them without boxes; 3 boxes, at most 2 in an image; 3 classes" in warnings
    assert "'circle'              1 box in        1 image" in warnings
    assert "data.csv:6: is less than 1 pixel wide or high: 1,1,2,1.1" in warnings
    assert "data.csv:4: class 'dog' is not in the class list" in errors
    assert text.endswith("training would not start\n")


def test_the_program_says_when_nothing_is_wrong(tmp_path, capsys):
    assert check.main(flags(tmp_path, LINES)) == 0
    assert capsys.readouterr().out.endswith("no errors found\n")
    assert check.main(["--dataset", "shapes", "--shapes_train", "20", "--shapes_val", "5"]) == 0


def test_strict_turns_warnings_into_a_bad_status(tmp_path, capsys):
    arguments = flags(tmp_path, [*LINES, GOOD])
    assert check.main(arguments) == 0
    assert check.main([*arguments, "--strict"]) == 1
    assert "repeats a box of the same image and class: 1,1,9,9" in capsys.readouterr().out


def test_one_broken_file_does_not_hide_the_problems_of_the_other(tmp_path, capsys):
    arguments = flags(tmp_path, [*LINES, GOOD], LINES)
    (tmp_path / "val" / "data.csv").write_bytes(b"")
    assert check.main(arguments) == 1
    text = capsys.readouterr().out
    assert "val/data.csv: is empty" in text and "repeats a box" in text


def test_one_bad_annotation_does_not_hide_the_problems_of_images_and_sets(tmp_path, capsys):
    lines = [*LINES, "a.png,1,1,9,9,dog", "gone.png,1,1,9,9,circle", "a.png,40,30,90,40,circle"]
    arguments = flags(tmp_path, lines, LINES)
    assert check.main(arguments) == 1
    text = capsys.readouterr().out
    for part in ("class 'dog' is not", "'gone.png' does not exist", "partly outside: 40,30,90,40", "leak"):
        assert part in text


def test_the_verdict_on_the_classes_is_that_of_training(tmp_path, capsys):
    content = coco_content()
    root = write_coco_data(tmp_path, content, "train2017")
    content["categories"][0]["name"] = "dog"
    write_coco_data(tmp_path, content, "val2017")
    assert check.main(["--dataset", "coco", "--coco_path", root]) == 1
    text = capsys.readouterr().out
    assert "lacks 'cat'" in text and "lacks 'dog'" in text and text.endswith("training would not start\n")


def test_bad_images_and_annotations_can_be_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [*LINES, "a.png,1,1,9,9,dog", "gone.png,1,1,9,9,circle"]
    assert check.main([*flags(tmp_path, lines), "--skip_bad"]) == 0
    assert capsys.readouterr().out.endswith("training can start\n")
    skipped = (tmp_path / "skipped.csv").read_text()
    assert "data.csv:4," in skipped and "class 'dog'" in skipped and "data.csv:5," in skipped and "gone.png" in skipped
