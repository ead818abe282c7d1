import builtins

import numpy as np
import pytest
from helpers import gradient, save

from retinanet.data.checks import check_dataset
from retinanet.data.report import DataError
from retinanet.data.yolo import YoloDataset
from retinanet.errors import UserError


def write_yolo(root, texts, layout="images/train", names="cat\ndog\n"):
    """Write a set of 40 x 80 images; `texts`: name without suffix -> content of its text file, None for no file."""
    images = root / layout
    labels = root / layout.replace("images", "labels")
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for name, text in texts.items():
        save(gradient(40, 80), images / f"{name}.png")
        if text is not None:
            (labels / f"{name}.txt").write_text(text)
    if names is not None:
        (root / "classes.txt").write_text(names)
    return root


@pytest.mark.parametrize("layout", ["images/train", "train/images"])
def test_fractions_become_pixels(tmp_path, layout):
    texts = {"b": "1 0.5 0.5 0.5 1.0\n\n0 0.25 0.75 0.1 0.2\n", "a": None, "c": ""}
    data = YoloDataset(write_yolo(tmp_path, texts, layout))
    assert [data.image_path(index)[-5:] for index in range(3)] == ["a.png", "b.png", "c.png"]
    assert [len(data.load_annotations(index)) for index in range(3)] == [0, 2, 0]
    assert data.load_annotations(1) == pytest.approx(np.array([[20, 0, 60, 40, 1], [16, 26, 24, 34, 0]]))
    assert data.labels == {0: "cat", 1: "dog"}
    assert data.image_sizes.tolist() == [[40, 80]] * 3


def test_an_outline_gives_its_bounding_box(tmp_path):
    data = YoloDataset(write_yolo(tmp_path, {"a": "0 0.5 0.1 0.75 0.5 0.25 0.9\n"}))
    assert data.load_annotations(0) == pytest.approx(np.array([[20, 4, 60, 36, 0]]))


def test_a_box_is_cut_at_the_border(tmp_path):
    data = YoloDataset(write_yolo(tmp_path, {"a": "0 0.1 0.5 0.3 1.01\n"}))
    assert data[0]["annot"] == pytest.approx(np.array([[0, 0, 20, 40, 0]]))


def test_a_box_of_one_pixel_survives_its_rounding(tmp_path):
    data = YoloDataset(write_yolo(tmp_path, {"a": "0 0.506249 0.5124999 0.012499 0.0249999\n"}))
    assert len(data.annotations) == len(data[0]["annot"]) == 1


def test_all_problems_are_reported_at_once(tmp_path):
    box = "1 0.5 0.5 0.5 0.5\n"
    lines = f"0 0.5\n{box}{box}2 0.5 0.5 0.5 0.5\n0 0.5 0.5 -0.1 0.5\n0 x\n"
    root = write_yolo(tmp_path, {"a": lines, "b": "", "c": box})
    (root / "labels/train/b.txt").write_bytes(box.encode() + b"\xe9\n")
    (root / "images/train/c.png").write_bytes(b"")
    with pytest.raises(DataError) as error:
        YoloDataset(root)
    kinds = ["wrong column count", "duplicate box", "unknown class", "inverted box", "not a number"]
    assert error.value.report.counts == dict.fromkeys([*kinds, "bad entry", "unreadable image"], 1)
    for message in ("a.txt:5: a box needs x1 < x2", "b.txt:2: is not in UTF-8", "c.png: cannot be read"):
        assert message in str(error.value)


def test_what_is_dropped_is_counted(tmp_path):
    texts = {"a": "1 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n1 0.5 0.5 0 0.5\n0 1.2 0.5 0.2 0.5\n"}
    data = YoloDataset(write_yolo(tmp_path, texts))
    counts = {"duplicate box": 1, "sub-pixel box": 1, "box outside": 1}
    assert check_dataset(data).counts == counts and len(data[0]["annot"]) == 1


def test_class_names_are_utf8_with_or_without_a_byte_order_mark(tmp_path):
    root = write_yolo(tmp_path, {"a": None}, names=None)
    (root / "classes.txt").write_bytes("\ufeffcafé\nb\n".encode())
    assert YoloDataset(root).labels == {0: "café", 1: "b"}
    (root / "classes.txt").write_bytes("a\ncafé\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes\.txt:2: is not in UTF-8"):
        YoloDataset(root)
    pytest.importorskip("yaml")
    (root / "classes.txt").rename(root / "data.yaml")
    with pytest.raises(UserError, match=r"data\.yaml:2: is not in UTF-8"):
        YoloDataset(root)


@pytest.mark.parametrize("names", ["names: [cat, dog]\n", "names:\n  1: dog\n  0: cat\nnc: 2\n"])
def test_names_from_yaml(tmp_path, names):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": "1 0.5 0.5 0.5 0.5\n"}, names=None)
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\n{names}")
    assert YoloDataset(root).labels == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("text", ["nc: 2\n", "names: []\n", "names: {1: cat}\n", "[1, 2]\n", "names: [\n"])
def test_yaml_without_names_is_an_error(tmp_path, text):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": ""}, names=None)
    (root / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=r"data\.yaml: (needs `names`|is not valid YAML)"):
        YoloDataset(root)


def test_without_pyyaml_the_message_says_what_to_do(tmp_path, monkeypatch):
    root = write_yolo(tmp_path, {"a": ""}, names=None)
    (root / "data.yaml").write_text("names: [cat]\n")
    real_import = builtins.__import__

    def without_yaml(name, *args, **kwargs):
        if name == "yaml":
            raise ModuleNotFoundError("No module named 'yaml'", name="yaml")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_yaml)
    with pytest.raises(
        UserError, match=r"data\.yaml: is not read, because PyYAML is not .*retinanet\[yolo\].*classes\.txt"
    ):
        YoloDataset(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.5\n", r"a\.txt:1: expected `class x y width height`, found 4 numbers"),
        ("0 0.5 0.5 0.5 0.5\ncat 0.5 0.5 0.5 0.5\n", r"a\.txt:2: expected numbers"),
        ("2 0.5 0.5 0.5 0.5\n", r"a\.txt:1: class 2 is not one of 0 to 1"),
        ("0.5 0.5 0.5 0.5 0.5\n", r"a\.txt:1: class 0\.5 is not one of"),
        ("0 40 20 30 10\n", r"a\.txt:1: a box must be in fractions"),
        ("0 nan 0.5 0.5 0.5\n", r"a\.txt:1: a box must be in fractions"),
    ],
)
def test_a_wrong_line_is_an_error_that_names_it(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        YoloDataset(write_yolo(tmp_path, {"a": text}))


def test_a_missing_folder_or_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"has no images/train, but no files"):
        YoloDataset(tmp_path)
    root = write_yolo(tmp_path, {}, names=None)
    with pytest.raises(UserError, match=r"images/train: holds no images"):
        YoloDataset(root)
    save(gradient(40, 80), root / "images/train/a.png")
    with pytest.raises(UserError, match=r"has neither classes\.txt nor data\.yaml"):
        YoloDataset(root)
    with pytest.raises(UserError, match=r"no set named 'val'; its sets are: 'train'"):
        YoloDataset(root, "val")


def test_text_files_without_an_image_are_reported(tmp_path):
    root = write_yolo(tmp_path, {"a": "1 0.5 0.5 0.5 0.5\n"})
    (root / "labels/train/classes.txt").write_text("cat\ndog\n")
    assert YoloDataset(root).report.counts == {}
    (root / "labels/train/b.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    report = YoloDataset(root).report
    assert report.counts == {"stray file": 1} and "b.txt: no image" in report.text(["stray file"])
    (root / "labels").rename(root / "label")
    with pytest.raises(UserError, match=r"labels/train: does not exist"):
        YoloDataset(root)


def test_the_box_of_a_pose_is_read(tmp_path):
    root = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.2 0.2 0.1 0.1 0.9 0.9\n"})
    for shape in ("[2, 2]", "\n- 2\n- 2"):
        (root / "data.yaml").write_text(f"names: [cat, dog]\nkpt_shape: {shape}\n")
        assert YoloDataset(root).load_annotations(0) == pytest.approx(np.array([[32, 16, 48, 24, 0]]))
    (root / "data.yaml").write_text("names: [cat, dog]\nkpt_shape: [3, 2]\n")
    with pytest.raises(UserError, match=r"a\.txt:1: expected `class x y width height`, found 9 numbers"):
        YoloDataset(root)


def test_the_key_points_of_a_pose_may_be_declared_in_two_files(tmp_path):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.2 0.2 0.1 0.1 0.9 0.9\n"})
    for name in ("data.yaml", "dataset.yaml"):
        (root / name).write_text("names: [cat, dog]\nkpt_shape: [2, 2]\n")
    assert YoloDataset(root).load_annotations(0) == pytest.approx(np.array([[32, 16, 48, 24, 0]]))


def test_images_may_lie_in_folders(tmp_path):
    root = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.5 0.5\n"})
    for kind, ending in (("images", "png"), ("labels", "txt")):
        (root / kind / "train/sub").mkdir()
        (root / kind / f"train/a.{ending}").rename(root / kind / f"train/sub/a.{ending}")
    data = YoloDataset(root)
    assert data.image_path(0).endswith("sub/a.png") and data.annotation_name(0).endswith("labels/train/sub/a.txt:1")


def test_two_images_with_one_text_file_are_an_error(tmp_path):
    root = write_yolo(tmp_path, {"a": None})
    save(gradient(40, 80), root / "images/train/._a.png")  # of macOS: no image of its own
    assert len(YoloDataset(root)) == 1
    save(gradient(40, 80), root / "images/train/a.bmp")
    with pytest.raises(UserError, match=r"a\.png: differs from a\.bmp only in its suffix"):
        YoloDataset(root)


def test_names_in_yaml_must_be_distinct_texts(tmp_path):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": None}, names=None)
    (root / "data.yaml").write_text("names: [yes, 01, ~]\n")
    assert YoloDataset(root).labels == {0: "yes", 1: "01", 2: "~"}
    (root / "data.yaml").write_text("names: [cat, cat]\n")
    with pytest.raises(UserError, match=r"data\.yaml: the `names` must differ"):
        YoloDataset(root)


BOX = "1 0.5 0.5 0.5 0.5\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("data.yaml", "names: [helmet, vest]\n"),
        ("labels/train/classes.txt", "cat\ndog\nbird\n"),
        ("obj.names", "dog\ncat\n"),
    ],
)
def test_sources_that_disagree_on_the_classes_are_an_error_that_names_both(tmp_path, file, text):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": BOX})
    (root / file).write_text(text)
    with pytest.raises(UserError, match=rf"classes\.txt and .*{file} have different classes: .*(lacks|order differs)"):
        YoloDataset(root)


def test_paths_in_yaml_are_followed_and_what_they_leave_out_is_reported(tmp_path):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": BOX})
    write_yolo(tmp_path / "more", {"b": BOX, "c": BOX}, "images/site", names=None)
    (root / "data.yaml").write_text("train: more/images/site\nnames: [cat, dog]\n")
    data = YoloDataset(root)
    assert len(data) == 2 and data.report.counts == {"other source": 1}
    assert "images/train: is ignored: the set 'train' is read from" in data.report.text(["other source"])
    (root / "data.yaml").write_text("train: [images/train, more/images/site]\nval: [../images/train]\n")
    assert len(YoloDataset(root)) == 3 and len(YoloDataset(root, "val")) == 1
    (tmp_path / "more/data.yaml").write_text("train: ../images/train\nnames: [cat, dog]\n")
    write_yolo(tmp_path / "more", {"d": BOX}, names=None)
    with pytest.raises(UserError, match=r"'../images/train' may be .*/images/train or .*/more/images/train; give"):
        YoloDataset(tmp_path / "more")


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    root = write_yolo(tmp_path / "data", {"a": BOX})
    write_yolo(tmp_path / "store", {"b": BOX})
    for kind in ("images", "labels"):
        (root / kind / "train/site").symlink_to(tmp_path / "store" / kind / "train")
        (root / kind / "train/loop").symlink_to(root / kind / "train")
    data = YoloDataset(root)
    assert len(data) == len(data.annotations) == 2 and data.report.counts == {}


def test_a_list_names_each_image_once_and_missing_ones_together(tmp_path):
    root = write_yolo(tmp_path, {"a": BOX, "b": BOX})
    (root / "val.txt").write_text("images/train/a.png\n./images/train/a.png\nimages/train/b.png\n")
    data = YoloDataset(root, "val")
    assert len(data) == 2 and data.report.counts == {"repeated image": 1}
    (root / "val.txt").write_text("".join(f"images/gone/{number}.png\n" for number in range(30)))
    with pytest.raises(UserError, match=r"val\.txt: image 'images/gone/0.png' does not exist in .* \(30 times"):
        YoloDataset(root, "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kpt_shape: [" + "9" * 5000 + ", 3]\nnames: [cat, dog]\n", "kpt_shape must be two whole numbers"),
        ("kpt_shape: 7\nnames: [cat, dog]\n", "kpt_shape must be two whole numbers, not '7'"),
        ("names: " + "[" * 500 + "]" * 500, "is not valid YAML, or is nested too deeply"),
        ("a: &a [x]\nb: &b [*a, *a]\nnames: *b\n", "needs `names`"),
    ],
    ids=["digits", "number", "deep", "aliases"],
)
def test_hostile_yaml_is_one_clear_error(tmp_path, text, message):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": BOX})
    (root / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        YoloDataset(root)
    assert len(str(error.value)) < 1000


def test_unknown_classes_are_counted_by_class(tmp_path):
    texts = {name: "".join(f"{label} 0.{label} 0.5 0.1 0.1\n" for label in (5, 6, 7)) for name in "abcdefgh"}
    with pytest.raises(DataError) as error:
        YoloDataset(write_yolo(tmp_path, texts))
    assert [problem.count for problem in error.value.report.examples["unknown class"]] == [8, 8, 8]


def test_a_path_in_yaml_that_does_not_exist_is_reported(tmp_path, caplog):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": BOX})
    names = "names: [cat, dog]\n"
    (root / "data.yaml").write_text(f"train: [images/train, images/extrra]\n{names}")
    with pytest.raises(UserError, match=r"data\.yaml: 'images/extrra' of the set 'train' cannot be found"):
        YoloDataset(root)
    (root / "data.yaml").write_text(f"train: /home/someone/images/train\n{names}")  # on another computer
    with caplog.at_level("WARNING", logger="retinanet"):
        assert len(YoloDataset(root)) == 1
    assert "'/home/someone/images/train' of the set 'train' cannot be found" in caplog.text
    (root / "data.yaml").write_text(f"train: images/train\nval: images/gone\n{names}")
    assert len(YoloDataset(root)) == 1  # val is not needed


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classes.txt", "cat\n\ndog\n", r"classes\.txt:2: is blank"),
        ("data.yaml", "nc: 3\nnames: [cat, dog]\n", r"data\.yaml: `nc` is '3', but .* names 2 classes"),
        ("data.yaml", "names: [cat, '']\n", "none may be empty"),
        ("obj.data", "classes = 3\n", r"obj\.data: `classes` is '3', but .* names 2 classes"),
    ],
)
def test_class_lists_that_contradict_themselves_are_errors(tmp_path, file, text, message):
    pytest.importorskip("yaml")
    root = write_yolo(tmp_path, {"a": BOX})
    (root / file).write_text(text)
    with pytest.raises(UserError, match=message):
        YoloDataset(root)


def test_numbers_with_digit_separators_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected numbers"):
        YoloDataset(write_yolo(tmp_path, {"a": "0 0.5 0.5 0.2_5 0.5\n"}))


@pytest.mark.parametrize("layout", ["images/train", "train/images"])
def test_the_letter_case_of_folders_does_not_matter(tmp_path, layout):
    root = write_yolo(tmp_path, {"a": BOX}, layout)
    for old in (layout, layout.replace("images", "labels")):
        (root / old).rename(root / old.replace("/", "-"))
        (root / old.title()).parent.mkdir(exist_ok=True)
        (root / old.replace("/", "-")).rename(root / old.title())
    assert len(YoloDataset(root).annotations) == 1


def test_the_letter_case_of_a_set_may_differ_between_images_and_labels(tmp_path):
    root = write_yolo(tmp_path, {"a": BOX}, "images/train [1]")
    (root / "images/train [1]").rename(root / "images/Train [1]")
    assert len(YoloDataset(root, "Train [1]").annotations) == 1
