import pickle
import re

import numpy as np
import pytest
import torch
from helpers import exif, gradient, save, write_coco_data, write_csv_data
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import Compose, v2

from retinanet.data.classes import check_classes, placeholder_names
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.dataset import DetectionDataset
from retinanet.data.ground_truth import coco_content
from retinanet.data.loader import collater
from retinanet.data.transforms import V2, Augmenter, ColourJitter, RandomCrop, Resizer
from retinanet.errors import UserError

BOX = [0.5, 0, 10, 10]


def make_dataset():
    """Two images; the second has a box and a difficult one, which comes first in the arrays."""
    annotations = [[*BOX, 1], [*BOX, 0], [1, 2, 3, 4, 0]]
    return DetectionDataset(["0.png", "1.png"], annotations, [1, 1, 0], ["a", "b"], difficult=[True, False, False])


def test_annotations_are_kept_in_the_order_of_their_images():
    data = make_dataset()
    assert data.image_index.tolist() == [0, 1] and data.annotation_ids.tolist() == [2, 1]
    assert data.load_annotations(0).tolist() == [[1, 2, 3, 4, 0]]
    assert data.load_annotations(1).tolist() == [[*BOX, 0]]
    assert data.load_difficult(0).shape == (0, 5) and data.load_difficult(1).tolist() == [[*BOX, 1]]
    assert data.annotation_name(1) == "DetectionDataset: box 1"


def test_any_data_set_has_ground_truth_for_cocos_evaluation():
    data = make_dataset()
    found = [(a["image_id"], a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in data.coco.anns.values()]
    assert found == [(0, 0, [1, 2, 2, 2], 4, 0), (1, 0, [0.5, 0, 9.5, 10], 95, 0), (1, 1, [0.5, 0, 9.5, 10], 95, 1)]
    assert data.coco_labels == {0: 0, 1: 1} and data.image_ids == list(data.coco.imgs) == [0, 1]


def test_ids_count_from_1_in_a_file():
    data = make_dataset()
    data.known_sizes[:] = 20
    content = coco_content(data, ["x.png", "y.png"])
    assert content["images"][1] == {"id": 2, "file_name": "y.png", "height": 20, "width": 20}
    assert [(a["image_id"], a["category_id"]) for a in content["annotations"]] == [(1, 1), (2, 1), (2, 2)]


def test_a_transform_is_applied_last(tmp_path):
    def count_boxes(sample):
        return {**sample, "boxes": len(sample["annot"]), "shape": sample["img"].shape}

    data = CSVDataset(*write_csv_data(tmp_path), transform=count_boxes)
    assert data[0]["boxes"] == 2 and data[0]["shape"] == (48, 64, 3)


def returned(tmp_path, result):
    """The first sample of a data set whose transform returns `result`, or the sample updated with a dict `result`."""

    def users_own(sample):
        return {**sample, **result} if isinstance(result, dict) else result

    return CSVDataset(*write_csv_data(tmp_path), transform=Compose([users_own]))[0]  # 48 high, 64 wide; 3 classes


GOOD = [4, 8, 24, 40, 1]
ANNOT, IMAGE = "annot must be numbers", "img must be [H, W, 3], uint8 or normalised floats"
WANTED = "but must have x1 < x2 and y1 < y2 within the image, 48 x 64, a label from 0 to 2"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "a NoneType is not a sample, which is a dict with the arrays img and annot (TypeError: "),
        (("img", "annot"), "a tuple is not a sample, which is a dict with the arrays"),
        ({"annot": np.zeros(0)}, f"{ANNOT} [G, 5] (x1, y1, x2, y2, label), without boxes [0, 5], not float64 [0]"),
        ({"annot": []}, ANNOT),
        ({"annot": None}, ANNOT),
        ({"annot": np.zeros((0, 4), dtype=np.float32)}, ANNOT),
        ({"annot": np.zeros((5, 4))}, ANNOT),
        ({"annot": np.array(GOOD)}, ANNOT),
        ({"annot": np.array([GOOD], dtype=object)}, ANNOT),
        ({"annot": np.array([["4", "8", "24", "40", "1"]])}, ANNOT),
        ({"annot": [GOOD, [1, 2]]}, "a dict is not a sample, which is a dict with the arrays img and annot (Val"),
        ({"annot": np.array([GOOD, [4, 8, np.nan, 40, 1]])}, f"annot holds [4.0, 8.0, nan, 40.0, 1.0], {WANTED}"),
        ({"annot": np.array([[4, 8, np.inf, 40, 1]])}, WANTED),
        ({"annot": np.array([[24, 8, 4, 40, 1]])}, f"annot holds [24, 8, 4, 40, 1], {WANTED}"),
        ({"annot": np.array([[4, 8, 4, 40, 1]])}, WANTED),
        ({"annot": np.array([[4, 8, 66, 40, 1]])}, WANTED),
        ({"annot": np.array([[-2, 8, 24, 40, 1]])}, WANTED),
        ({"annot": np.array([GOOD, [4, 8, 24, 40, 3]])}, f"annot holds [4, 8, 24, 40, 3], {WANTED}"),
        ({"annot": np.array([[4, 8, 24, 40, -1]])}, WANTED),
        ({"annot": np.array([[4, 8, 24, 40, 0.5]])}, WANTED),
        ({"annot": np.array([[4, 8, 24, 40, np.nan]])}, WANTED),
        ({"img": np.zeros((48, 64), dtype=np.uint8)}, f"{IMAGE}, not uint8 [48, 64]"),
        ({"img": torch.zeros(3, 48, 64)}, f"{IMAGE}, not float32 [3, 48, 64]"),
        ({"img": np.zeros((0, 64, 3), dtype=np.uint8)}, IMAGE),
        ({"img": np.zeros((48, 64, 4), dtype=np.uint8)}, IMAGE),
        ({"img": np.zeros((48, 64, 3), dtype=int)}, IMAGE),
        ({"img": np.zeros((48, 64, 3), dtype=np.uint16)}, IMAGE),
        ({"img": None}, IMAGE),
        ({"img": np.full((48, 64, 3), 255.0)}, "img holds floats far from 0"),
        ({"img": np.full((48, 64, 3), np.nan)}, "img holds floats far from 0"),
    ],
)
def test_an_invalid_sample_is_a_clear_error(tmp_path, result, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        returned(tmp_path, result)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'a.png'}: transform Compose(") and "users_own" in text and "\n" not in text


def test_a_sample_without_its_image_is_a_clear_error(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path), transform=lambda sample: {"image": sample["img"], "annot": []})
    with pytest.raises(UserError, match=r"a\.png: .*<lambda>: a dict is not .*KeyError: 'img'"):
        data[0]


@pytest.mark.parametrize("ours", [lambda sample: Augmenter()(sample, 1), RandomCrop(0.5), Resizer(), ColourJitter(0.1)])
@pytest.mark.parametrize("wrong", [{"annot": np.zeros(0)}, {"annot": np.zeros((5, 4))}, {"img": None}])
def test_a_transform_that_gets_an_invalid_sample_raises_the_same_error(tmp_path, ours, wrong):
    data = CSVDataset(*write_csv_data(tmp_path), transform=Compose([lambda sample: {**sample, **wrong}, ours]))
    with pytest.raises(UserError, match=r"a\.png: transform Compose\(.*: (annot must be|img must be)"):
        data[0]


@pytest.mark.parametrize(
    "result",
    [
        {"annot": np.zeros((0, 5))},
        {"annot": torch.zeros(0, 5)},
        {"annot": [GOOD]},
        {"annot": np.array([GOOD])},
        {"annot": np.array([GOOD], dtype=np.float64)[:, ::-1][:, ::-1]},
        {"annot": torch.tensor([GOOD], dtype=torch.float64)},
        {"annot": np.array([[-0.5, 8, 64.5, 40, 1]])},
        {"img": gradient(48, 64)[:, ::-1]},
        {"img": Image.fromarray(gradient(48, 64))},
        {"img": np.zeros((48, 64, 3))},
        {"img": np.zeros((48, 64, 3), dtype=">f4"), "annot": np.array([GOOD], dtype=">f8")},
        {"img": tv_tensors.Image(torch.zeros(48, 64, 3, dtype=torch.uint8))},
    ],
)
def test_unusual_but_valid_samples_make_a_batch(tmp_path, result):
    sample = returned(tmp_path, result)
    batch = collater([sample, sample])
    assert tuple(batch["img"].shape) == (2, 3, 48, 64) and batch["annot"].dtype == torch.float32
    assert batch["size"][0] == (48, 64) and batch["scale"][0] == 1
    np.testing.assert_allclose(
        batch["annot"][0, : len(sample["annot"])], np.asarray(result.get("annot", sample["annot"]))
    )


@pytest.mark.parametrize("transform", [v2.RandomHorizontalFlip(), v2.Compose([Resizer(), v2.RandomVerticalFlip()])])
def test_bare_torchvision_transforms_are_refused(transform):
    with pytest.raises(UserError, match=r"transform Random\w+Flip does not take samples: wrap it in V2"):
        DetectionDataset(["0.png"], [], [], ["a"], transform)
    DetectionDataset(["0.png"], [], [], ["a"], v2.RandomApply([V2(transform), Augmenter()]))


def test_a_transform_may_drop_the_index(tmp_path):
    data = CSVDataset(
        *write_csv_data(tmp_path), transform=lambda sample: {"img": sample["img"], "annot": sample["annot"]}
    )
    assert data[1]["index"] == 1


def test_boxes_are_clipped_to_the_image_and_dropped_outside_it(tmp_path):
    boxes = ["-3,-4,10,12", "50,40,90,80", "64,10,70,20", "63.5,1,80,9"]
    data = CSVDataset(*write_csv_data(tmp_path, [f"a.png,{box},circle" for box in boxes]))  # 64 wide, 48 high
    assert data[0]["annot"].tolist() == [[0, 0, 10, 12, 0], [50, 40, 64, 48, 0]]
    assert data[0]["annot"].dtype == np.float32 and len(data.load_annotations(0)) == 4


def test_changing_a_sample_does_not_change_the_data(tmp_path):
    data = CSVDataset(*write_csv_data(tmp_path))
    data[0]["annot"][:] = 0
    assert data[0]["annot"][0].tolist() == [4, 8, 24, 40, 1]


def test_aspect_ratio_is_width_over_height_after_turning(tmp_path):
    files = write_csv_data(tmp_path)
    save(gradient(48, 64), tmp_path / "a.png", exif=exif(6))
    data = CSVDataset(*files)
    assert [data.image_aspect_ratio(index) for index in (0, 1)] == pytest.approx([48 / 64, 48 / 64])


def test_images_in_memory_need_no_declared_sizes():
    class InMemory(DetectionDataset):
        in_files = False

        def load_image(self, index):
            return gradient(20 + index, 40)

    data = InMemory(["a", "b"], [[*BOX, 0]], [0], ["x"])
    assert data.image_sizes.tolist() == [[20, 40], [21, 40]] and data.image_aspect_ratio(0) == 2


def test_data_sets_can_be_sent_to_another_process(tmp_path):
    for data in (CSVDataset(*write_csv_data(tmp_path)), CocoDataset(write_coco_data(tmp_path), "val2017")):
        copy = pickle.loads(pickle.dumps(data))
        np.testing.assert_array_equal(copy[0]["annot"], data[0]["annot"])


def test_classes_are_compared_by_name_or_placeholders_by_their_number():
    data = make_dataset()
    check_classes("the model", ["a", "b"], data)
    check_classes("the model", placeholder_names(2), data)
    for names, difference in (
        (["b", "a"], "label 0 is 'b' and 'a': the order differs"),
        (["a"], "the model lacks 'b'"),
        (["a", "b", "c"], "DetectionDataset lacks 'c'"),
        (["a", *"defghijk"], "the model lacks 'b'; DetectionDataset lacks 'd', 'e', 'f', 'g', 'h' and 3 more"),
        (placeholder_names(3), "lacks 'a', 'b'; DetectionDataset lacks 'class 0', 'class 1', 'class 2'"),
    ):
        with pytest.raises(UserError) as error:
            check_classes("the model", names, data)
        assert str(error.value).startswith("the model and DetectionDataset have different classes: ")
        assert str(error.value).endswith(difference)
