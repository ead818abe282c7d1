import numpy as np
import pytest
import torch
from helpers import gradient, in_memory

from retinanet.boxes import box_iou
from retinanet.data.loader import make_loader
from retinanet.data.tiles import KEPT_SHARE, RandomTile, Tiling, merge_cut_boxes, overview
from retinanet.data.transforms import Resizer
from retinanet.errors import UserError


@pytest.mark.parametrize(("height", "width"), [(1500, 2100), (512, 513), (300, 1300), (40, 50), (512, 512), (1, 9000)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_tiles_cover_the_image_and_overlap_enough(height, width, overlap):
    tiling = Tiling(512, overlap)
    tiles = tiling.boxes(height, width)
    assert len(tiles) == tiling.count(height, width) and tiling.fits(height, width) == (len(tiles) == 1)
    assert (tiles[:, 2:] - tiles[:, :2] == np.minimum((width, height), 512)).all()
    for axis, length in ((0, width), (1, height)):
        starts = np.unique(tiles[:, axis])
        assert starts[0] == 0 and starts[-1] + min(length, 512) == length
        assert (np.diff(starts) <= 512 - 512 * overlap).all()


def test_tiles_lie_row_by_row_and_the_last_is_shifted_inwards():
    expected = [[0, 0, 100, 100], [75, 0, 175, 100], [80, 0, 180, 100]]
    expected += [[0, 20, 100, 120], [75, 20, 175, 120], [80, 20, 180, 120]]
    assert Tiling(100).boxes(120, 180).tolist() == expected


@pytest.mark.parametrize("wrong", [0, -1, 15, 16_385, 100.0, "100", True, float("nan")])
def test_impossible_tiles_are_errors(wrong):
    with pytest.raises(UserError, match="tile must be a whole number of pixels from 16 to"):
        Tiling(wrong)
    with pytest.raises(UserError, match=r"tile_overlap must be a share from 0 to 0\.9"):
        Tiling(100, 1.0 if wrong == 0 else wrong)


def test_batches_hold_the_pixels_of_the_tiles():
    image = gradient(130, 180)
    batches = list(Tiling(100).batches(image, 4))
    assert [len(batch["img"]) for batch in batches] == [4, 2] == [len(batch["size"]) for batch in batches]
    for batch in batches:
        assert batch["img"].shape[1:] == (3, 128, 128) and batch["scale"] == [1.0] * len(batch["tile"])
        for pixels, (x1, y1, x2, y2), size in zip(batch["img"], batch["tile"], batch["size"], strict=True):
            np.testing.assert_array_equal(pixels[:, : size[0], : size[1]].permute(1, 2, 0), image[y1:y2, x1:x2])
    resized = Resizer(100, 100)({"img": image[:100, :100], "annot": np.zeros((0, 5))})  # which Resizer does at scale 1
    assert torch.equal(batches[0]["img"][0].permute(1, 2, 0), resized["img"])


def visible(objects, tile, share):
    """Boxes in a tile's pixels, and whether a perfect detector would find them: with at least `share` of their area."""
    x1, y1, x2, y2 = tile
    clipped = objects.clip([x1, y1, x1, y1], [x2, y2, x2, y2])
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (clipped, objects)]
    return clipped - [x1, y1, x1, y1], (areas[0] > 0) & (areas[0] >= share * areas[1])


def merged(objects, labels, tiling, size, share=0.3, scores=None):
    objects, labels = np.array(objects, dtype=float), np.array(labels)
    scores = np.full(len(objects), 0.9) if scores is None else np.array(scores)
    columns, tiles = [], tiling.boxes(*size)
    for number, tile in enumerate(tiles):
        boxes, seen = visible(objects, tile, share)
        boxes = boxes[seen] + np.tile(tile[:2], 2)
        columns.append((scores[seen], labels[seen], boxes, np.full(seen.sum(), number)))
    scores, labels, boxes, index = (torch.from_numpy(np.concatenate(column)) for column in zip(*columns, strict=True))
    tiles = torch.from_numpy(tiles).float()
    found = merge_cut_boxes(scores.float(), labels, boxes.float(), index, tiles)
    return found


def assert_once(found, objects, labels):
    """Check that each object is found with its whole box; exact repeats are allowed, because NMS removes them."""
    _, found_labels, boxes = found
    rows = {(label, *box) for label, box in zip(found_labels.tolist(), boxes.tolist(), strict=True)}
    assert rows == {(label, *map(float, box)) for label, box in zip(labels, objects, strict=True)}


# Tiles of 100 pixels start at 0, 75, 150, ..., so in x and y their borders are at 75 and 100, 150 and 175, ...
@pytest.mark.parametrize(
    "box",
    [
        (90, 20, 110, 40),  # on a border, cut in the first tile, whole in the second
        (80, 80, 95, 95),  # whole in all four tiles of a corner
        (92, 92, 110, 110),  # on the corner of four tiles, whole in one of them
        (70, 20, 105, 40),  # larger than the overlap of 25, cut in both tiles
        (60, 65, 115, 120),  # larger, on the corner of four tiles: cut in all
        (60, 20, 240, 60),  # larger than a tile
        (10, 10, 290, 290),  # larger than a tile in both directions
        (0, 0, 90, 20),  # at the image's own border, which cuts nothing
        (99, 20, 120, 40),  # one pixel beyond a border
        (75, 20, 100, 40),  # from border to border
    ],
)
def test_an_object_on_a_border_is_found_once_with_its_whole_box(box):
    assert_once(merged([box], [1], Tiling(100), (300, 300), share=0.05), [box], [1])


def test_objects_that_touch_stay_apart():
    rows = [(x, y, x + 20, y + 30) for y in range(0, 300, 30) for x in range(0, 300, 20)]  # shelves
    assert_once(merged(rows, [0] * len(rows), Tiling(100), (300, 300)), rows, [0] * len(rows))
    pair = [(70, 20, 100, 40), (100, 20, 130, 40), (70, 40, 130, 60)]  # larger than the overlap, at a border
    assert_once(merged(pair, [0, 0, 0], Tiling(100), (300, 300)), pair, [0, 0, 0])


def test_classes_stay_apart_and_the_best_score_stays():
    box = (70, 20, 105, 40)
    found = merged([box, box], [0, 1], Tiling(100), (300, 300), scores=[0.4, 0.8])
    assert_once(found, [box, box], [0, 1])
    assert sorted(found[0].tolist()) == pytest.approx([0.4, 0.8])


def test_a_cut_box_loses_to_the_whole_one_even_with_a_better_score():
    tiles = torch.tensor([[0, 0, 100, 100], [75, 0, 175, 100]]).float()
    boxes = torch.tensor([[80.0, 20, 100, 40], [80, 20, 110, 40]])
    scores, labels, index = torch.tensor([0.9, 0.4]), torch.zeros(2, dtype=torch.long), torch.tensor([0, 1])
    found = merge_cut_boxes(scores, labels, boxes, index, tiles)
    assert found[2].tolist() == [[80, 20, 110, 40]] and found[0].tolist() == pytest.approx([0.4])


def test_half_an_object_that_looks_like_another_loses_to_the_whole_one():
    tiles = torch.tensor([[0, 0, 100, 100], [75, 0, 175, 100]]).float()
    # The first tile takes the cut object for one of another class, and for two objects; the second sees all of it.
    boxes = torch.tensor([[80.0, 20, 100, 40], [80, 20, 100, 40], [80, 20, 100, 27], [80, 20, 110, 40]])
    scores, labels = torch.tensor([0.8, 0.7, 0.6, 0.9]), torch.tensor([1, 0, 0, 0])
    index = torch.tensor([0, 0, 0, 1])
    assert merge_cut_boxes(scores, labels, boxes, index, tiles)[2].tolist() == [[80, 20, 110, 40]]
    scores[0] = 0.95  # better than the whole one, so both are kept
    assert merge_cut_boxes(scores, labels, boxes, index, tiles)[1].tolist() == [1, 0]
    boxes[3] = torch.tensor([80, 20, 90, 40])  # a small object in front of a larger one that no tile sees whole
    boxes[0], scores[0] = torch.tensor([60, 20, 100, 40]), 0.5
    assert len(merge_cut_boxes(*(values[[0, 3]] for values in (scores, labels, boxes, index)), tiles)[0]) == 2


def test_boxes_of_one_tile_are_never_joined():
    tiles = torch.tensor([[0, 0, 100, 100], [75, 0, 175, 100]]).float()
    # Two overlapping objects, both cut in both tiles, with the same extent where both tiles see them.
    boxes = torch.tensor([[30.0, 20, 100, 40], [60, 20, 100, 40], [75, 20, 120, 40], [75, 20, 170, 40]])
    index = torch.tensor([0, 0, 1, 1])
    found = merge_cut_boxes(torch.ones(4), torch.zeros(4, dtype=torch.long), boxes, index, tiles)
    assert len(found[0]) == 2 and found[2][:, 0].tolist() in ([30, 60], [60, 30])


@pytest.mark.parametrize(("largest", "number"), [(25, 150), (60, 60), (180, 12)])
def test_the_objects_of_random_scenes_are_found_whole(largest, number):
    rng = np.random.default_rng(largest)
    objects = []
    while len(objects) < number:
        size = rng.integers(5, largest, 2)
        corner = rng.integers(0, (600, 400) - size)
        box = np.concatenate([corner, corner + size])
        if (
            not objects
            or box_iou(torch.from_numpy(box[None]).float(), torch.tensor(np.array(objects)).float()).max() == 0
        ):
            objects.append(box)
    labels = rng.integers(0, 2, number).tolist()
    assert_once(merged(objects, labels, Tiling(100), (400, 600), share=0.05), objects, labels)


def test_without_detections_nothing_is_merged():
    nothing = merge_cut_boxes(
        torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 4), torch.zeros(0).long(), torch.tensor([[0.0, 0, 9, 9]])
    )
    assert [len(values) for values in nothing] == [0, 0, 0]


def test_a_training_tile_holds_a_box_or_background():
    image = gradient(400, 600)
    annotations = np.array([[550.0, 350, 580, 380, 1], [20, 30, 60, 50, 0]], dtype=np.float32)
    sample = {"img": image, "annot": annotations, "index": 7}
    holds, sizes = [], set()
    for share in (0.0, 1.0):
        tile = RandomTile(128, share)
        parts = [tile(sample) for _ in range(40)]
        holds.append([len(part["annot"]) for part in parts])
        sizes |= {part["img"].shape for part in parts}
        for part in parts:
            for x1, y1, x2, y2, label in part["annot"]:
                original = annotations[annotations[:, 4] == label][0]
                width, height = original[2:4] - original[:2]
                assert (x2 - x1) * (y2 - y1) >= KEPT_SHARE * width * height and 0 <= x1 < x2 <= 128
                # The pixels under the box are those of the image: the gradient shows where they come from.
                found = part["img"][int(y2) - 1, int(x2) - 1]
                assert (image[max(0, int(original[3]) - 40) : int(original[3]), :] == found).all(axis=2).any()
    assert min(holds[0]) >= 1 and max(holds[1]) == 0 and sizes == {(128, 128, 3)}
    assert np.array_equal(sample["annot"], annotations)
    assert RandomTile(700, 0)(sample)["img"].shape == image.shape  # it fits


def test_boxes_larger_than_a_tile_hold_the_tile():
    sample = {
        "img": gradient(400, 600),
        "annot": np.array([[0, 0, 600, 390, 0], [0, 0, 100, 400, 1]], dtype=np.float32),
    }
    for _ in range(20):
        part = RandomTile(128, 0)(sample)
        assert (
            part["img"].shape == (128, 128, 3) and (part["annot"][:, 4] != 0).all()
        )  # too little of the first is inside


def test_a_loader_gives_small_images_first_and_tiles_of_the_others():
    data = in_memory(np.zeros((0, 5)), num_images=3, class_names=["a"])
    images = [gradient(90, 100), gradient(100, 230), gradient(60, 60)]
    data.in_files, data.known_sizes = False, np.array([image.shape[:2] for image in images])
    data.load_image = lambda index: images[index]
    data.transform = Resizer(64, 64)
    assert [batch["index"] for batch in make_loader(data, 2, tiling=Tiling(256))] == [[2, 0], [1]]
    loader = make_loader(data, 2, tiling=Tiling(100))
    batches = list(loader)
    assert [batch["index"] for batch in batches] == [[2, 0], [1, 1], [1]] and len(loader) == 3
    assert ["tile" in batch for batch in batches] == [False, True, True]


def test_an_overview_is_the_reduced_image():
    image = gradient(300, 410)
    same, scale = overview(image, 410)
    assert scale == 1 and np.array_equal(same, image)
    small, scale = overview(image, 100)
    assert small.shape == (60, 82, 3) and scale == 1 / 5
    assert np.abs(small.astype(int) - image[2::5, 2:410:5][:60, :82].astype(int)).max() <= 3
