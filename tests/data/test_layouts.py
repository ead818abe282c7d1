"""The layouts of many tools, written as the tools write them: each is read with the same boxes and classes."""

import json
from pathlib import Path

import pytest
from helpers import gradient, save

from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.voc import VOCDataset
from retinanet.data.yolo import YoloDataset
from retinanet.errors import UserError

WIDTH, HEIGHT = 100, 80
BOXES = {
    "a": [("thing", (10, 10, 60, 50)), ("other", (20, 30, 40, 70))],
    "b": [("other", (0, 8, 100, 72))],
}
CLASSES = ["other", "thing"]


def draw(folder, names=BOXES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        save(gradient(HEIGHT, WIDTH), folder / f"{name}.png")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def found(dataset):
    """The boxes of each image, with the names of their classes; also checks that each image can be opened."""
    boxes = {}
    for index in range(len(dataset)):
        assert dataset[index]["img"].shape == (HEIGHT, WIDTH, 3)
        rows = dataset.load_annotations(index).round(3).tolist()
        boxes[Path(dataset.image_path(index)).stem] = [
            (dataset.label_to_name(int(label)), tuple(box)) for *box, label in rows
        ]
    assert list(dataset.labels.values()) == CLASSES
    return boxes


# COCO


def write_coco(path, image_prefix="", root_category=False):
    names = ["things", *CLASSES] if root_category else CLASSES
    categories = [
        {"id": label, "name": name, "supercategory": "none" if name == "things" else "things"}
        for label, name in enumerate(names)
    ]
    images, annotations = [], []
    for index, (name, boxes) in enumerate(BOXES.items()):
        images.append({"id": index, "file_name": f"{image_prefix}{name}.png", "width": WIDTH, "height": HEIGHT})
        for label, (x1, y1, x2, y2) in boxes:
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": names.index(label), "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": index, "area": (x2 - x1) * (y2 - y1), **box})
    write(path, json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def coco(root):
    draw(root / "images/train2017")
    write_coco(root / "annotations/instances_train2017.json")
    return CocoDataset(root)


def coco_of_roboflow(root):
    draw(root / "train")
    write_coco(root / "train/_annotations.coco.json", root_category=True)
    return CocoDataset(root)


def coco_of_cvat(root):
    draw(root / "images")
    write_coco(root / "annotations/instances_default.json")
    return CocoDataset(root, "default")


def coco_of_label_studio(root):
    draw(root / "images")
    write_coco(root / "result.json", "images/")
    return CocoDataset(root, str(root / "result.json"))


def coco_file_and_folder(root):
    draw(root / "pictures")
    write_coco(root / "elsewhere/labels.json")
    return CocoDataset(root / "pictures", str(root / "elsewhere/labels.json"))


# Pascal VOC


def write_voc(folder, ending="png"):
    for name, boxes in BOXES.items():
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, (x1, y1, x2, y2) in boxes
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        write(folder / f"{name}.xml", f"<annotation><filename>{name}.{ending}</filename>{size}{objects}</annotation>")


def voc(root):
    draw(root / "JPEGImages")
    write_voc(root / "Annotations")
    write(root / "ImageSets/Main/train.txt", "a\nb\n")
    return VOCDataset(root)


def voc_of_roboflow(root):
    for name in ("train", "valid"):
        draw(root / name)
        write_voc(root / name)
    return VOCDataset(root, "val")


def voc_in_lower_case_without_lists(root):
    draw(root / "images")
    write_voc(root / "annotations")
    return VOCDataset(root)


def voc_of_label_img(root):
    draw(root)
    write_voc(root)
    return VOCDataset(root)


def voc_list_of_files(root):
    draw(root / "JPEGImages/train")
    write_voc(root / "Annotations/train")
    write(root / "ImageSets/Main/train.txt", "train/a.png\ntrain/b.png\ntrain/a.png\n")
    return VOCDataset(root)


def voc_two_endings(root):
    draw(root / "JPEGImages")
    for name in BOXES:
        save(gradient(5, 5), root / f"JPEGImages/{name}.bmp")
    write_voc(root / "Annotations")
    write(root / "ImageSets/Main/train.txt", "a\nb\n")
    return VOCDataset(root)


# YOLO


def write_yolo(folder):
    for name, boxes in BOXES.items():
        lines = [
            f"{CLASSES.index(label)} {(x1 + x2) / 2 / WIDTH} {(y1 + y2) / 2 / HEIGHT} "
            f"{(x2 - x1) / WIDTH} {(y2 - y1) / HEIGHT}\n"
            for label, (x1, y1, x2, y2) in boxes
        ]
        write(folder / f"{name}.txt", "".join(lines))


def yolo(root):
    draw(root / "images/train")
    write_yolo(root / "labels/train")
    write(root / "classes.txt", "other\nthing\n")
    return YoloDataset(root)


def yolo_of_roboflow(root):
    draw(root / "valid/images")
    write_yolo(root / "valid/labels")
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['other', 'thing']\n")
    return YoloDataset(root, "val")


def yolo_of_ultralytics(root):
    draw(root / "images/site1")
    write_yolo(root / "labels/site1")
    write(root / "data.yaml", f"path: {root}\ntrain: [images/site1]\nnames:\n  0: other\n  1: thing\n")
    return YoloDataset(root)


def yolo_of_darknet(root):
    draw(root / "obj")
    write_yolo(root / "obj")
    write(root / "train.txt", "data/obj/a.png\ndata/obj/b.png\n")
    write(root / "obj.names", "other\nthing\n")
    write(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    return YoloDataset(root)


def yolo_of_cvat(root):
    draw(root / "obj_train_data")
    write_yolo(root / "obj_train_data")
    write(root / "train.txt", "data/obj_train_data/a.png\ndata/obj_train_data/b.png\n")
    write(root / "obj.names", "other\nthing\n")
    return YoloDataset(root)


def darknet_of_roboflow(root):
    draw(root / "train")
    write_yolo(root / "train")
    write(root / "train/_darknet.labels", "other\nthing\n")
    return YoloDataset(root)


def yolo_of_label_studio(root):
    draw(root / "images")
    write_yolo(root / "labels")
    write(root / "classes.txt", "other\nthing\n")
    write(root / "notes.json", '{"categories": [{"id": 0, "name": "other"}, {"id": 1, "name": "thing"}]}')
    return YoloDataset(root)


def yolo_of_label_img(root):
    draw(root)
    write_yolo(root)
    write(root / "classes.txt", "other\nthing\n")
    return YoloDataset(root)


# CSV


def write_csv(root, header, line, name="train.csv"):
    draw(root)
    lines = [line.format(name=image, label=label, x1=x1, y1=y1, x2=x2, y2=y2)
             for image, boxes in BOXES.items() for label, (x1, y1, x2, y2) in boxes]  # fmt: skip
    write(root / name, "\n".join([*header, *lines]) + "\n")
    return CSVDataset(root / name)


def csv(root):
    return write_csv(root, [], "{name}.png,{x1},{y1},{x2},{y2},{label}")


def csv_of_roboflow_and_tensorflow(root):
    header = "filename,width,height,class,xmin,ymin,xmax,ymax"
    return write_csv(root, [header], "{name}.png,100,80,{label},{x1},{y1},{x2},{y2}", "_annotations.csv")


def csv_of_deepforest(root):
    return write_csv(root, ["image_path,xmin,xmax,ymin,ymax,label"], "{name}.png,{x1},{x2},{y1},{y2},{label}")


def csv_of_pandas(root):
    header = ";Label;Bottom;Right;Top;Left;Image Name;score"
    return write_csv(root, [header], "0;{label};{y2};{x2};{y1};{x1};{name}.png;0.5")


LAYOUTS = [
    *(coco, coco_of_roboflow, coco_of_cvat, coco_of_label_studio, coco_file_and_folder),
    *(voc, voc_of_roboflow, voc_in_lower_case_without_lists, voc_of_label_img, voc_list_of_files, voc_two_endings),
    *(yolo, yolo_of_roboflow, yolo_of_ultralytics, yolo_of_darknet, yolo_of_cvat, darknet_of_roboflow),
    *(yolo_of_label_studio, yolo_of_label_img),
    *(csv, csv_of_roboflow_and_tensorflow, csv_of_deepforest, csv_of_pandas),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_with_its_boxes_and_classes(tmp_path, layout):
    if "yaml" in str(layout.__code__.co_consts):
        pytest.importorskip("yaml")
    dataset = layout(tmp_path)
    assert found(dataset) == BOXES and not dataset.report.errors()


@pytest.mark.parametrize(
    ("layout", "read"),
    [(coco, CocoDataset), (voc, VOCDataset), (voc_of_roboflow, VOCDataset), (yolo, YoloDataset)],
)
def test_an_unknown_set_is_an_error_that_lists_the_sets(tmp_path, layout, read):
    layout(tmp_path)
    with pytest.raises(UserError, match=r"has no set named 'test'; its sets are: '(train|train2017)'"):
        read(tmp_path, "test")


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        (CocoDataset, "annotations/instances_train.json or train/_annotations.coco.json"),
        (VOCDataset, "ImageSets/Main/train.txt, and no XML files"),
        (YoloDataset, "images/train"),
    ],
)
def test_a_folder_in_another_layout_is_an_error_that_names_the_flags_to_read_it(tmp_path, read, wanted):
    for name in ("sub/a.csv", "c.csv"):
        write(tmp_path / name, "")
    write(tmp_path / "b.md", "")
    with pytest.raises(UserError) as error:
        read(tmp_path, "train")
    assert f"{tmp_path}: has no {wanted}, but 2 .csv, 1 .md; such files are read with --dataset csv" in str(error.value)
    with pytest.raises(UserError, match=r"nowhere: (is not a folder|cannot be read)"):
        read(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("read", "write_annotations"), [(VOCDataset, write_voc), (YoloDataset, write_yolo)], ids=["voc", "yolo"]
)
def test_a_folder_without_sets_is_split_by_the_names_of_its_images(tmp_path, monkeypatch, read, write_annotations):
    monkeypatch.setitem(globals(), "BOXES", {f"image{number}": BOXES["a"] for number in range(20)})
    draw(tmp_path, BOXES)
    write_annotations(tmp_path)
    (tmp_path / "classes.txt").write_text("other\nthing\n")
    train, val = (set(found(read(tmp_path, name, val_share=0.2))) for name in ("train", "val"))
    assert len(val) == 4 and train == set(BOXES) - val
    assert found(read(tmp_path, "train")) == found(read(tmp_path, "all")) == BOXES
    assert set(found(read(tmp_path, "valid", val_share=0.2))) == val
    with pytest.raises(UserError, match=r"use --val_share 0.2 to validate on a fifth"):
        read(tmp_path, "val")
