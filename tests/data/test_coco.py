import json
from pathlib import Path

import pytest
from helpers import coco_content, truncate, write_coco_data

from retinanet.data.checks import check_dataset
from retinanet.data.coco import CocoDataset
from retinanet.data.ground_truth import coco_content as content_of
from retinanet.data.report import DataError
from retinanet.errors import UserError


def write(folder, change=lambda content: None, **options):
    """The data set of `coco_content` after `change`."""
    content = coco_content()
    change(content)
    return CocoDataset(write_coco_data(folder, content, **options), "val2017")


def coco_report(folder, change):
    """The report about `coco_content` after `change`, whether it can be read or not."""
    try:
        return check_dataset(write(folder, change))
    except DataError as error:
        return error.report


def test_samples_by_hand(tmp_path):
    data = write(tmp_path)
    assert data.image_ids == [7, 42, 99]
    assert data[0]["annot"].tolist() == [[1, 2, 31, 42, 0], [10, 10, 18, 19.5, 1]]
    assert data[1]["annot"].tolist() == [[5, 6, 25, 36, 1]]
    assert data[0]["img"].shape == (48, 64, 3)
    assert data[2]["annot"].shape == (0, 5) and data[2]["img"].shape == (48, 48, 3)  # an image without objects


def test_classes_come_from_the_file_in_the_order_of_their_ids(tmp_path):
    data = write(tmp_path)
    assert data.num_classes() == 2  # the original: 80, always
    assert data.labels == {0: "car", 1: "cat"} and data.coco_labels == {0: 3, 1: 17}
    assert [data.label_to_coco_label(label) for label in (0, 1)] == [3, 17]
    assert [data.coco_label_to_label(category_id) for category_id in (3, 17)] == [0, 1]


def test_images_may_lie_beside_the_annotations_folder(tmp_path):
    assert write(tmp_path, folder_name=".")[0]["img"].shape == (48, 64, 3)


def test_sizes_are_the_declared_ones_or_else_those_of_the_images(tmp_path):
    def remove_sizes(content):
        for image in content["images"]:
            del image["width"], image["height"]

    def make_floats(content):
        for image in content["images"]:
            image["height"] = float(image["height"])

    expected = [[48, 64], [64, 48], [48, 48]]
    data = write(tmp_path / "without", remove_sizes)
    assert not data.declared_sizes.any() and data.image_sizes.tolist() == expected
    data = write(tmp_path / "with", make_floats)
    for path in tmp_path.glob("with/images/*/*.png"):
        path.unlink()
    assert data.image_sizes.tolist() == expected and data.report.counts == {"crowds": 1}
    assert data.image_aspect_ratio(0) == pytest.approx(64 / 48)


# Ground truth


def test_crowds_are_not_trained_on_but_evaluated(tmp_path):
    def change(content):  # adds an object with the box of a crowd, which is not its duplicate
        content["annotations"].append({**content["annotations"][3], "id": 5, "iscrowd": 0})

    data = write(tmp_path, change)
    assert data.annotation_ids.tolist() == [2, 3, 5, 1]
    assert data.load_difficult(0).tolist() == [[0, 0, 64, 48, 1]]
    assert [entry["id"] for entry in data.coco.loadAnns(data.coco.getAnnIds(iscrowd=True))] == [4]


def test_evaluation_uses_the_exact_numbers_of_the_file_and_reads_it_once(tmp_path):
    def change(content):
        content["annotations"][0] |= {"bbox": [5, 6, 0.1, 30], "area": 3}  # training drops it
        content["annotations"][1]["bbox"][0] = 0.1  # not exact in float32

    data = write(tmp_path, change)
    Path(data.annotation_file).unlink()
    assert data.annotation_ids.tolist() == [2, 3]
    expected = coco_content()
    change(expected)
    fields = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    assert [{key: entry[key] for key in fields} for entry in data.coco.dataset["annotations"]] == expected[
        "annotations"
    ]
    assert data.coco.imgs == {image["id"]: image for image in expected["images"]}
    assert data.coco.cats == {category["id"]: category for category in expected["categories"]}


@pytest.mark.parametrize("area", [None, "large", [1, 2], 10**400, float("nan")])
def test_an_invalid_area_is_replaced_by_that_of_the_box(tmp_path, area):
    def change(content):
        content["annotations"][0]["area"] = area
        del content["annotations"][1]["area"], content["annotations"][1]["iscrowd"]

    truth = write(tmp_path, change).coco
    assert [(truth.anns[number]["area"], truth.anns[number]["iscrowd"]) for number in (1, 2, 3)] == [
        (600, 0),
        (1200, 0),
        (76, 0),
    ]


@pytest.mark.parametrize("number", [0, 2])
def test_annotations_without_distinct_ids_are_renumbered_for_evaluation(tmp_path, number):
    data = write(tmp_path, lambda content: content["annotations"][2].update(id=number))
    assert sorted(data.coco.anns) == [1, 2, 3, 4] and number in data.annotation_ids


def test_a_converted_file_holds_the_training_boxes_rounded_to_thousandths(tmp_path):
    def change(content):
        content["annotations"][0]["bbox"] = [5, 6, 0.1, 30]
        content["annotations"][2]["bbox"] = [10, 10, 8.12345, 9.5]

    data = write(tmp_path, change)
    content = content_of(data, ["x.png", "y.png", "z.png"])
    assert content["images"][1] == {"id": 42, "file_name": "y.png", "height": 64, "width": 48}
    assert content["categories"] == [{"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]
    assert [(entry["id"], entry["bbox"], entry["iscrowd"]) for entry in content["annotations"]] == [
        (1, [1, 2, 30, 40], 0),
        (2, [10, 10, 8.123, 9.5], 0),
        (3, [0, 0, 64, 48], 1),
    ]
    json.dumps(content)


# Crowds


def test_many_crowds_are_reported_once_and_can_be_read_as_objects(tmp_path):
    def change(content):
        for entry in content["annotations"]:
            entry |= {"iscrowd": 1, "segmentation": {"counts": [3072], "size": [48, 64]}}

    data = write(tmp_path, change)
    assert len(data.annotations) == 0 and len(data.difficult_annotations) == 4
    (problem,) = data.report.examples["crowds"]
    assert "4 of 4 annotations are crowds" in problem.message and "--crowds_are_objects" in problem.message
    assert len(data.report.examples["crowd-only image"]) == 1
    data = CocoDataset(data.root_dir, "val2017", crowds_are_objects=True)
    assert len(data.annotations) == 4 and not data.report.counts
    assert all(entry["iscrowd"] == 0 for entry in data.coco.dataset["annotations"])


def test_a_few_crowds_are_not_reported(tmp_path):
    def change(content):
        template = content["annotations"][0]
        content["annotations"] += [{**template, "id": 10 + n, "bbox": [n / 9, 6, 20, 30]} for n in range(60)]

    assert "crowds" not in write(tmp_path, change).report.counts


# Layouts


def test_a_root_category_of_roboflow_is_left_out_only_without_boxes(tmp_path):
    content = coco_content()
    content["categories"].append({"id": 0, "name": "things", "supercategory": "none"})
    root = write_coco_data(tmp_path)
    file = tmp_path / "images/val2017/_annotations.coco.json"
    for category_id, names in ((17, ["car", "cat"]), (0, ["things", "car", "cat"])):
        content["annotations"][0]["category_id"] = category_id
        file.write_text(json.dumps(content))
        assert list(CocoDataset(root, str(file)).labels.values()) == names


def test_a_second_file_for_the_same_set_is_reported(tmp_path):
    root = Path(write_coco_data(tmp_path))
    (root / "val2017.json").write_text("{}")
    report = CocoDataset(root, "val").report
    assert "val2017.json: is ignored: the set 'val' is read from" in report.text(["other source"])


# Problems


@pytest.mark.parametrize(
    ("change", "kind", "where"),
    [
        (lambda c: c["annotations"][2].update(bbox=[1, 2, "3", 4]), "bad entry", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3]), "bad entry", ": annotation 3"),
        (lambda c: c["annotations"][2].pop("bbox"), "bad entry", ": annotation 3"),
        (lambda c: c["annotations"].append(7), "bad entry", ": entry 4 of `annotations`"),
        (lambda c: c["images"][1].pop("file_name"), "bad entry", ": entry 1 of `images`"),
        (lambda c: c["categories"][0].pop("name"), "bad entry", ": entry 0 of `categories`"),
        (lambda c: c["annotations"][1].update(iscrowd="0"), "bad entry", ": annotation 2"),
        (lambda c: c["annotations"][1].update(iscrowd=2), "bad entry", ": annotation 2"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, float("nan"), 4]), "not finite", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, -3, 4]), "inverted box", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 0, 4]), "sub-pixel box", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[50, 2, 30, 4]), "box partly outside", ": annotation 3"),
        (lambda c: c["annotations"][2].update(bbox=[1, 50, 3, 4]), "box outside", ": annotation 3"),
        (lambda c: c["annotations"][2].update(image_id=8), "unknown image", ": annotation 3"),
        (lambda c: c["annotations"][2].update(category_id=8), "unknown class", ": annotation 3"),
        (lambda c: c["annotations"].append({**c["annotations"][2], "id": 9}), "duplicate box", ": annotation 9"),
        (lambda c: c["annotations"][2].update(id=2), "annotation ids", ": annotation 2"),
        (lambda c: c["annotations"][2].update(id=0), "annotation ids", ": annotation 0"),
        (lambda c: c["annotations"][0].update(iscrowd=1), "crowd-only image", ": image 42"),
        (lambda c: c["images"][1].update(id=42), "duplicate image id", ": image id 42"),
        (lambda c: c["images"][0].update(width=64, height=48), "declared size", ": image 42"),
        (lambda c: c["images"][0].update(width=0), "declared size", ": image 42"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "missing image", ": image 42"),
        (lambda c: c["categories"].append({"id": 3, "name": "dog"}), "class list", ": category id 3"),
        (lambda c: c["categories"].append({"id": 4, "name": "cat"}), "class list", ": category name 'cat'"),
        (lambda c: c["categories"].append({"id": 0, "name": "things"}), "unused class", ""),
        (lambda c: [a.update(iscrowd=[1]) for a in c["annotations"]], "bad entry", ": annotation 1"),
    ],
)
def test_a_problem_is_reported_with_its_id(tmp_path, change, kind, where):
    report = coco_report(tmp_path, change)
    assert report.examples[kind][0].where.split("val2017.json")[-1] == where


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content["images"].clear(), ": its list `images` is empty"),
        (lambda content: content.pop("categories"), ": has no list named `categories`"),
        (
            lambda content: content["images"].clear() or content["images"].append(1),
            ": entry 0 of `images`: is 1, not an object",
        ),
        (lambda content: content["annotations"][2].pop("bbox"), ": annotation 3: needs bbox, four numbers"),
        (lambda content: content["annotations"][0].update(image_id=8), ": annotation 1: image 8 does not exist"),
        (lambda content: content["annotations"][1].update(category_id=5), ": annotation 2: category 5 does not exist"),
        (lambda content: content["annotations"][2].update(bbox=None), ": annotation 3: bbox None is not four numbers"),
        (
            lambda content: content["annotations"][2].update(bbox=[float("nan"), 1, 5, 5]),
            r": annotation 3: .*found nan,1,5,5",
        ),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(tmp_path, spoil, message):
    with pytest.raises(UserError, match=rf"instances_val2017\.json{message}"):
        write(tmp_path, spoil)


def test_a_file_that_is_missing_or_not_json_is_an_error(tmp_path):
    root = write_coco_data(tmp_path)
    with pytest.raises(UserError, match=r"has no set named 'test'; its sets are: 'val2017'$"):
        CocoDataset(root, "test")
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        CocoDataset(root, "none.json")
    path = tmp_path / "annotations" / "instances_val2017.json"
    truncate(path)
    with pytest.raises(UserError, match=r"instances_val2017\.json:1: is not valid JSON"):
        CocoDataset(root, "val2017")
    for content, message in (
        (json.dumps([1, 2]).encode(), ": has no list named"),
        (b"{}{}", ":1: is not valid JSON .*two documents"),
        (b'"\xff"', ": is not in UTF-8"),
        (b"[" * 100_000, ": is not valid JSON, or is too deep"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"instances_val2017\.json{message}"):
            CocoDataset(root, "val2017")


def test_corners_in_place_of_widths_are_recognised(tmp_path):
    def change(content):
        names = {"image_id": 7, "category_id": 3}
        content["annotations"] = [{"id": n, **names, "bbox": [30 + n, 20 + n, 50 + n, 40]} for n in range(1, 6)]

    assert "looks like x1, y1, x2, y2" in coco_report(tmp_path, change).errors()


def test_a_declared_size_of_another_shape_is_reported_once(tmp_path):
    report = coco_report(tmp_path, lambda content: content["images"][1].update(width=48, height=64))
    problem = report.examples["declared size"][0]
    assert problem.where.endswith("image 7") and "48 x 64, and has 64 x 48 pixels in its file" in problem.message


@pytest.mark.parametrize(
    ("area", "expected"),
    [(350, 350), (600, 600), (650, 650), (652, 600), (-1, 600), (0, 600), (1e12, 600), ("1e400", 600)],
)
def test_a_declared_area_is_used_if_it_fits_the_box(tmp_path, area, expected):
    content = coco_content()
    content["annotations"][0]["area"] = area  # the box has 20 x 30 pixels, or 21 x 31 as some tools count
    root = Path(write_coco_data(tmp_path))
    text = json.dumps(content).replace('"1e400"', "1e400")
    (root / "annotations" / "instances_val2017.json").write_text(text)
    data = CocoDataset(root, "val2017")
    assert data.coco.anns[1]["area"] == expected
    assert data.report.counts.get("declared area", 0) == (expected != area)


def test_ids_may_be_written_as_floats(tmp_path):
    def change(content):
        for entries, keys in (("images", ["id"]), ("annotations", ["id", "image_id", "category_id"])):
            for entry in content[entries]:
                entry |= {key: float(entry[key]) for key in keys}

    data, expected = write(tmp_path / "a", change), write(tmp_path / "b")
    assert data.image_ids == expected.image_ids == [7, 42, 99] and all(type(id) is int for id in data.image_ids)
    assert data.coco.dataset == expected.coco.dataset


def test_large_ids_beside_ids_written_as_floats_are_exact(tmp_path):
    def change(content):
        for entry in content["annotations"]:
            entry |= {"id": 2**60 + entry["id"], "category_id": float(entry["category_id"])}

    annotations = write(tmp_path, change).coco.dataset["annotations"]
    assert [entry["id"] - 2**60 for entry in annotations] == [1, 2, 3, 4]


def test_problems_are_grouped_by_cause_and_repeated_names_are_listed_with_their_ids(tmp_path):
    def change(content):
        template = content["annotations"][0]
        content["annotations"] += [
            {**template, "id": 10 + number, "category_id": 4 + number % 2, "bbox": [number, 1, 9, 9]}
            for number in range(9)
        ]
        content["categories"].append({"id": 18, "name": "cat"})

    report = coco_report(tmp_path, change)
    assert [(problem.cause, problem.count) for problem in report.examples["unknown class"]] == [(4, 5), (5, 4)]
    assert report.examples["class list"][0].message == "is repeated: it has the ids [17, 18]"


@pytest.mark.parametrize(("key", "value"), [("bbox", [True, 5, 20, 20]), ("category_id", True), ("image_id", False)])
def test_booleans_are_not_numbers(tmp_path, key, value):
    def change(content):
        content["annotations"][0][key] = value

    (problem,) = coco_report(tmp_path, change).examples["bad entry"]
    assert key in problem.message
