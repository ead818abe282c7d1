import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import coco_content, gradient, save, write_coco_data
from pycocotools.coco import COCO

from retinanet.commands import convert
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.voc import VOCDataset
from retinanet.data.yolo import YoloDataset

NAMES = ["wolf", "bear", "fox"]  # not sorted, and no image has a fox
BOXES = {
    "a.png": [[3.25, 4.5, 40.75, 30.125, "bear"], [0, 0, 64, 48, "wolf"]],
    "b.png": [],
    "sub, folder/c.png": [[10, 12, 11.5, 40, "wolf"], [63, 47, 64, 48, "bear"], [5.5, 5.5, 6.75, 7, "bear"]],
}


@pytest.fixture
def source(tmp_path):
    """CSV data: boxes with fractions, at the border, of one pixel; an image without any; names to quote."""
    folder = tmp_path / "source"
    (folder / "sub, folder").mkdir(parents=True)
    lines = []
    for name, boxes in BOXES.items():
        save(gradient(48, 64), folder / name)
        lines += [f'"{name}",{x1},{y1},{x2},{y2},{label}' for x1, y1, x2, y2, label in boxes] or [f"{name},,,,,"]
    (folder / "val.csv").write_text("\n".join(lines))
    (folder / "classes.csv").write_text("".join(f"{name},{label}\n" for label, name in enumerate(NAMES)))
    return folder


def read(kind, root):
    if kind == "csv":
        return CSVDataset(root / "val.csv", root / "classes.csv")
    return {"coco": CocoDataset, "voc": VOCDataset, "yolo": YoloDataset}[kind](root, "val")


def run(kind, source, to, out, *flags):
    where = ["--source", str(source), "--set", "val"]
    if kind == "csv":
        where = ["--source", str(source / "val.csv"), "--csv_classes", str(source / "classes.csv")]
    return convert.main(["--from", kind, *where, "--to", to, "--out", str(out), *flags])


def content(dataset):
    """Sorted boxes by the image's name and the class name; the difficult ones apart."""
    boxes = {}
    for index in range(len(dataset)):
        for annotations, mark in (
            (dataset.load_annotations(index), ""),
            (dataset.load_difficult(index), " (difficult)"),
        ):
            for *box, label in annotations.tolist():
                key = Path(dataset.image_path(index)).name, dataset.label_to_name(int(label)) + mark
                boxes.setdefault(key, []).append(box)
    return {key: np.array(sorted(value)) for key, value in boxes.items()}


def assert_same(dataset, expected, tolerance):
    found, expected = content(dataset), content(expected)
    assert found.keys() == expected.keys()
    for key, boxes in expected.items():
        assert found[key].shape == boxes.shape, key
        assert np.abs(found[key] - boxes).max() <= tolerance, key


@pytest.mark.parametrize("kind", ["csv", "coco", "voc", "yolo"])
def test_there_and_back(source, tmp_path, kind):
    assert run("csv", source, kind, tmp_path / "there") == 0
    there, original = read(kind, tmp_path / "there"), read("csv", source)
    tolerance = 0.5 if kind == "voc" else 1e-4  # VOC has whole pixels
    assert_same(there, original, tolerance)
    assert list(there.labels.values()) == NAMES and len(there) == 3
    assert np.array_equal(there.load_image(0), original.load_image(0))
    assert run(kind, tmp_path / "there", "csv", tmp_path / "back") == 0
    assert_same(read("csv", tmp_path / "back"), original, tolerance)


@pytest.mark.parametrize("chain", [["voc", "yolo", "coco"], ["coco", "voc", "yolo"], ["yolo", "coco", "voc"]])
def test_errors_do_not_add_up(source, tmp_path, chain):
    kind, root = "csv", source
    for number, to in enumerate(chain):
        assert run(kind, root, to, tmp_path / str(number), "--link") == 0
        kind, root = to, tmp_path / str(number)
    assert_same(read(kind, root), read("csv", source), 0.5 + 1e-4)
    assert (tmp_path / "0").exists() and any(path.is_symlink() for path in root.rglob("*.png"))


def test_difficult_boxes_are_kept_where_the_format_can_mark_them(source, tmp_path, capsys):
    run("csv", source, "voc", tmp_path / "voc")
    path = tmp_path / "voc" / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 1))
    voc = read("voc", tmp_path / "voc")
    assert len(voc.difficult_annotations) == 1

    assert run("voc", tmp_path / "voc", "voc", tmp_path / "again") == 0
    assert_same(read("voc", tmp_path / "again"), voc, 0)
    assert run("voc", tmp_path / "voc", "coco", tmp_path / "coco") == 0
    annotations = json.loads((tmp_path / "coco/annotations/instances_val.json").read_text())["annotations"]
    assert sorted(annotation["iscrowd"] for annotation in annotations) == [0, 0, 0, 0, 1]
    capsys.readouterr()
    assert run("voc", tmp_path / "voc", "yolo", tmp_path / "yolo") == 0
    assert "warning: left out: 1 difficult box" in capsys.readouterr().out
    assert len(read("yolo", tmp_path / "yolo").annotations) == 4


def test_pycocotools_reads_what_is_written(source, tmp_path):
    run("csv", source, "coco", tmp_path / "coco")
    coco = COCO(str(tmp_path / "coco/annotations/instances_val.json"))
    assert len(coco.getAnnIds()) == 5 and coco.loadCats(1)[0]["name"] == "wolf"
    annotation = coco.loadAnns(1)[0]
    assert annotation["bbox"] == [3.25, 4.5, 37.5, 25.625] and annotation["area"] == 37.5 * 25.625
    assert coco.loadImgs(2)[0] == {"id": 2, "file_name": "b.png", "width": 64, "height": 48}


def test_coco_keeps_its_ids(tmp_path):
    write_coco_data(tmp_path / "coco", set_name="val")
    assert run("coco", tmp_path / "coco", "coco", tmp_path / "again") == 0
    before, after = read("coco", tmp_path / "coco"), read("coco", tmp_path / "again")
    assert after.image_ids == before.image_ids and after.coco_labels == before.coco_labels
    assert len(after.difficult_annotations) == 1  # a crowd
    assert_same(after, before, 0)


def test_yolo_lists_its_sets_and_classes(source, tmp_path):
    for set_name in ("train", "val"):
        flags = ["--from", "csv", "--source", str(source / "val.csv"), "--csv_classes", str(source / "classes.csv")]
        assert convert.main([*flags, "--set", set_name, "--to", "yolo", "--out", str(tmp_path / "yolo")]) == 0
        (tmp_path / "yolo" / "images" / ".DS_Store").touch()  # of macOS: no set
    expected = 'train: images/train\nval: images/val\nnames: ["wolf", "bear", "fox"]\n'
    assert (tmp_path / "yolo/data.yaml").read_text() == expected
    assert (tmp_path / "yolo/labels/val/b.txt").read_text() == ""


def test_names_that_clash_get_their_folders(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        save(gradient(20, 30 if folder == "x" else 40), tmp_path / folder / "a.png")
    (tmp_path / "val.csv").write_text("x/a.png,1,2,3,4,cat\ny/a.png,,,,,\n")
    (tmp_path / "classes.csv").write_text("cat,0\n")
    assert run("csv", tmp_path, "voc", tmp_path / "voc") == 0
    voc = read("voc", tmp_path / "voc")
    assert [Path(voc.image_path(index)).name for index in (0, 1)] == ["x__a.png", "y__a.png"]
    assert [voc.load_image(index).shape[1] for index in (0, 1)] == [30, 40]


def test_images_that_differ_only_in_their_suffix_are_an_error(tmp_path, capsys):
    for name in ("a.png", "a.bmp"):
        save(gradient(20, 30), tmp_path / name)
    (tmp_path / "val.csv").write_text("a.png,1,2,3,4,cat\na.bmp,,,,,\n")
    (tmp_path / "classes.csv").write_text("cat,0\n")
    assert run("csv", tmp_path, "voc", tmp_path / "voc") == 1
    assert "a.png: two images have this name, or names that differ only in their suffix" in capsys.readouterr().err


def test_nothing_is_overwritten_with_other_content(source, tmp_path, capsys):
    assert run("csv", source, "voc", tmp_path / "out") == 0
    assert run("csv", source, "voc", tmp_path / "out") == 0  # the same again is fine
    save(gradient(48, 64)[::-1], source / "a.png")
    assert run("csv", source, "voc", tmp_path / "out") == 1
    assert "a.png: exists and differs from" in capsys.readouterr().err
    save(gradient(48, 64), source / "a.png")
    (source / "classes.csv").write_text("bear,0\nwolf,1\n")
    assert run("csv", source, "voc", tmp_path / "out") == 1
    assert "classes.txt: exists with other content" in capsys.readouterr().err


def test_missing_images_are_an_error(source, tmp_path, capsys):
    (source / "b.png").unlink()
    assert run("csv", source, "coco", tmp_path / "out") == 1
    assert "b.png" in capsys.readouterr().err


def test_usage_errors(tmp_path, capsys):
    for flags, message in (
        ([], "--from voc needs --set"),
        (["--set", "val", "--crowds_are_objects"], "--crowds_are_objects needs --from coco"),
    ):
        with pytest.raises(SystemExit) as error:
            convert.main(["--from", "voc", "--source", "x", "--to", "coco", "--out", str(tmp_path), *flags])
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_crowds_that_are_objects(tmp_path):
    write_coco_data(tmp_path / "coco", set_name="val")
    assert run("coco", tmp_path / "coco", "yolo", tmp_path / "yolo", "--crowds_are_objects") == 0
    assert len(read("yolo", tmp_path / "yolo").annotations) == 4


def one_image(folder, name, *annotations, size=(48, 64), classes="cat,0\n"):
    """CSV data of one image; returns the flags that convert it."""
    folder.mkdir()
    save(gradient(*size), folder / name)
    (folder / "val.csv").write_text("".join(f"{name},{row}\n" for row in annotations))
    (folder / "classes.csv").write_text(classes)
    return ["--from", "csv", "--source", str(folder / "val.csv"), "--csv_classes", str(folder / "classes.csv")]


@pytest.mark.parametrize(
    ("suffix", "message"),
    [("png", "a.xml: exists with other content"), ("bmp", "holds a.png, which differs from a.bmp only in its suffix")],
)
def test_a_second_set_does_not_overwrite_the_first(tmp_path, capsys, suffix, message):
    first = one_image(tmp_path / "x", "a.png", "1,2,30,40,cat")
    second = one_image(tmp_path / "y", f"a.{suffix}", "5,6,7,8,cat")
    out = ["--to", "voc", "--out", str(tmp_path / "voc")]
    assert convert.main([*first, *out, "--out_set", "train"]) == 0
    assert convert.main([*second, *out]) == 1
    assert message in capsys.readouterr().err
    assert VOCDataset(tmp_path / "voc", "train").load_annotations(0).tolist() == [[1, 2, 30, 40, 0]]


def test_the_source_is_not_overwritten(tmp_path, capsys):
    root = write_coco_data(tmp_path / "coco", set_name="val")
    before = (tmp_path / "coco/annotations/instances_val.json").read_text()
    assert run("coco", root, "coco", root) == 1
    assert "instances_val.json: exists with other content" in capsys.readouterr().err
    assert (tmp_path / "coco/annotations/instances_val.json").read_text() == before


def test_images_of_an_earlier_run_do_not_become_empty_ones(source, tmp_path, capsys):
    flags = one_image(tmp_path / "x", "other.png", "1,2,30,40,wolf", classes="wolf,0\nbear,1\nfox,2\n")
    assert run("csv", source, "yolo", tmp_path / "yolo") == 0
    assert convert.main([*flags, "--to", "yolo", "--out", str(tmp_path / "yolo")]) == 1
    assert "images/val: holds other images, such as a;" in capsys.readouterr().err
    assert len(read("yolo", tmp_path / "yolo")) == 3  # nothing was copied


@pytest.mark.parametrize("kind", ["csv", "coco", "voc", "yolo"])
def test_names_may_hold_spaces_commas_and_quotes(tmp_path, kind):
    flags = one_image(tmp_path / "x", "IMG 1 1.png", '1,2,30,40,"tench, ""Tinca"" 🐟"')
    (tmp_path / "x/classes.csv").write_text('"tench, ""Tinca"" 🐟",0\n')
    assert convert.main([*flags, "--to", kind, "--out", str(tmp_path / "out")]) == 0
    data = read(kind, tmp_path / "out")
    assert Path(data.image_path(0)).name == "IMG 1 1.png" and list(data.labels.values()) == ['tench, "Tinca" 🐟']


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_a_linked_image_keeps_its_name(tmp_path, link):
    flags = one_image(tmp_path / "x", "a.png", "1,2,30,40,cat")
    (tmp_path / "x/a.png").rename(tmp_path / "0123abcd")
    (tmp_path / "x/a.png").symlink_to("../0123abcd")
    assert convert.main([*flags, "--to", "yolo", "--out", str(tmp_path / "out"), *link]) == 0
    assert Path(read("yolo", tmp_path / "out").image_path(0)).name == "a.png"


def test_sizes_are_those_of_the_images_not_the_declared_ones(tmp_path):
    content = coco_content()
    for image in content["images"]:
        image["height"], image["width"] = image["width"], image["height"]
    write_coco_data(tmp_path / "coco", content, set_name="val")
    assert run("coco", tmp_path / "coco", "yolo", tmp_path / "yolo") == 0
    assert_same(read("yolo", tmp_path / "yolo"), CSVDataset(*as_csv(tmp_path)), 1e-4)


def as_csv(tmp_path):
    lines = ["a.png,1,2,31,42,car", "a.png,10,10,18,19.5,cat", "b.png,5,6,25,36,cat", "empty.png,,,,,"]
    folder = tmp_path / "coco/images/val"
    (folder / "val.csv").write_text("".join(f"{line}\n" for line in lines))
    (folder / "classes.csv").write_text("car,0\ncat,1\n")
    return folder / "val.csv", folder / "classes.csv"


def test_lost_boxes_are_counted(tmp_path, capsys):
    flags = one_image(tmp_path / "x", "a.png", "1,2,30,40,cat", "10.1,10,20,20,cat", "10.3,10,20,20,cat")
    assert convert.main([*flags, "--to", "voc", "--out", str(tmp_path / "voc")]) == 0
    printed = capsys.readouterr().out
    assert "left out: 1 box," in printed and "1 image, 2 boxes (and 0 difficult), 1 class" in printed


@pytest.mark.parametrize(
    "names",
    [
        ["traffic\nlight", "a\rb", "a\x0bb", "a\x1cb", "a\x85b", "a\u2028b"],
        [" a", "a\u3000", "\ufeffa", "\x1b[31m", "\ud83d"],
    ],
)
def test_names_that_a_target_cannot_hold_are_refused_before_anything_is_written(tmp_path, capsys, names):
    content = coco_content()
    names = [*names, "car"]
    content["categories"] = [
        {"id": id_, "name": name} for id_, name in zip([3, 17, *range(18, 16 + len(names))], names, strict=True)
    ]
    write_coco_data(tmp_path / "coco", content, set_name="val")
    for to in ("csv", "voc", "yolo"):
        assert run("coco", tmp_path / "coco", to, tmp_path / "out") == 1
        listed = ", ".join(f"class {name!r}" for name in names[:-1])
        assert f"{to} cannot hold these names: {listed};" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert run("coco", tmp_path / "coco", "coco", tmp_path / "again") == 0  # JSON holds any name
    assert list(read("coco", tmp_path / "again").labels.values()) == names


@pytest.mark.parametrize(
    ("to", "name"), [("voc", "a\nb.png"), ("voc", " a.png"), ("voc", "a .png"), ("yolo", ".a.png")]
)
def test_file_names_that_a_target_cannot_hold_are_refused(tmp_path, capsys, to, name):
    content = coco_content()
    content["images"][0]["file_name"] = name
    root = Path(write_coco_data(tmp_path / "coco", content, set_name="val"))
    (root / "images/val/b.png").rename(root / "images/val" / name)
    assert run("coco", root, to, tmp_path / "out") == 1
    assert f"image {name!r}" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", ["classes", "images"])
def test_what_was_written_is_compared_with_the_source(source, tmp_path, capsys, monkeypatch, changed):
    def write(dataset, names, root, set_name):
        convert.write_csv(dataset, names, root, set_name)
        name, old, new = {"classes": ("classes.csv", "fox", "dog"), "images": ("val.csv", "b.png", "d.png")}[changed]
        (root / name).write_text((root / name).read_text().replace(old, new))

    monkeypatch.setitem(convert.WRITERS, "csv", write)
    save(gradient(48, 64), source / "d.png")
    (tmp_path / "out/images/val").mkdir(parents=True)
    save(gradient(48, 64), tmp_path / "out/images/val/d.png")
    assert run("csv", source, "csv", tmp_path / "out") == 1
    assert f"the {changed} differ from those of the source" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../..", "..", ".", "/tmp/x", "a/b", "a\\b", "a\nb", " a", "a: b", ".a"])
def test_the_name_of_a_set_is_a_plain_word(source, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as error:
        run("csv", source, "coco", tmp_path / "out", "--out_set", name)
    assert error.value.code == 2 and "must be a plain word" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["csv", "coco", "voc", "yolo"])
def test_nothing_is_written_outside_the_folder(source, tmp_path, capsys, to):
    (tmp_path / "elsewhere").mkdir()
    for link in ("images", "JPEGImages", "labels", "annotations", "Annotations"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / link).symlink_to(tmp_path / "elsewhere")
    assert run("csv", source, to, tmp_path / "out") == 1
    assert "leads out of --out" in capsys.readouterr().err and not any((tmp_path / "elsewhere").iterdir())


def test_links_fifos_and_folders_are_not_written_to(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    makers = {
        "link": lambda path: path.symlink_to(tmp_path / "elsewhere"),
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
    }
    for make in makers.values():
        make(out / "classes.csv")
        assert run("csv", source, "csv", out) == 1
        assert "classes.csv: exists and is not a regular file" in capsys.readouterr().err
        (out / "classes.csv").rmdir() if (out / "classes.csv").is_dir() else (out / "classes.csv").unlink()
    (out / "images/val/a.png").symlink_to(tmp_path / "elsewhere")  # a link whose target does not exist
    assert run("csv", source, "csv", out) == 1
    assert "a.png: exists and differs from" in capsys.readouterr().err and not (tmp_path / "elsewhere").exists()
    (tmp_path / "file").write_text("")
    assert run("csv", source, "csv", tmp_path / "file") == 1
    assert "--out" in capsys.readouterr().err
