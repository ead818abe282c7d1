import copy
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import gradient
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import Compose, v2
from torchvision.transforms import functional as tv

from retinanet.data.samples import SampleError
from retinanet.data.transforms import (
    PIXEL_MEAN,
    PIXEL_STD,
    V2,
    Augmenter,
    ColourJitter,
    LargeScaleJitter,
    Normalizer,
    RandomCrop,
    Resizer,
    UnNormalizer,
    normalize,
    pad_value,
    resized_size,
)

BOXES = [[4, 8, 24, 40, 1], [30, 10, 60, 40, 0]]


def sample_of(height=48, width=64, boxes=BOXES, dtype=np.uint8):
    return {
        "img": gradient(height, width).astype(dtype),
        "annot": np.array(boxes, dtype=np.float32).reshape(-1, 5),
        "index": 3,
    }


# Normalising


def test_normalize_equals_torchvision():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    expected = tv.normalize(images / 255, PIXEL_MEAN, PIXEL_STD)
    torch.testing.assert_close(normalize(images), expected, atol=1e-5, rtol=1e-5)


def test_normalize_makes_channels_last():
    images = torch.zeros(2, 3, 5, 7, dtype=torch.uint8)
    assert normalize(images).is_contiguous(memory_format=torch.channels_last)


def test_normalize_takes_floats_as_normalised():
    images = torch.randn(1, 3, 4, 4)
    assert normalize(images) is images
    assert normalize(images.double()).dtype == torch.float32  # as the weights


def test_normalizer_by_hand_and_on_both_scales():
    grey = np.full((2, 3, 3), 51, dtype=np.uint8)  # 0.2
    expected = [(0.2 - mean) / std for mean, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)]
    for image in (grey, grey / 255, (grey / 255).astype(np.float32)):
        out = Normalizer()({"img": image, "annot": np.zeros((0, 5))})["img"]
        assert out.dtype == np.float32 and out.shape == (2, 3, 3)
        assert out[1, 2].tolist() == pytest.approx(expected, abs=1e-5)


def test_normalizer_on_the_host_equals_normalize_on_the_device():
    image = gradient(6, 8)
    host = torch.from_numpy(Normalizer()({"img": image, "annot": np.zeros((0, 5))})["img"]).permute(2, 0, 1)
    torch.testing.assert_close(host, normalize(torch.from_numpy(image).permute(2, 0, 1)[None])[0], atol=1e-5, rtol=1e-5)


def test_unnormalizer_inverts_and_leaves_its_input():
    pixels = torch.rand(2, 3, 4, 5)
    normalised = tv.normalize(pixels, PIXEL_MEAN, PIXEL_STD)
    before = normalised.clone()
    torch.testing.assert_close(UnNormalizer()(normalised), pixels)
    torch.testing.assert_close(UnNormalizer()(normalised[0]), pixels[0])
    assert torch.equal(normalised, before)  # the original changed it in place


def test_unnormalizer_takes_other_constants():
    assert UnNormalizer(mean=[1, 2, 3], std=[2, 2, 2])(torch.ones(3, 1, 1)).flatten().tolist() == [3, 4, 5]


def test_padding_is_zero_once_normalised():
    pixels = pad_value(torch.uint8)[:, None, None]
    assert normalize(pixels[None]).abs().max() < 0.5 / 255 / min(PIXEL_STD) + 1e-6
    assert pad_value(torch.float64).tolist() == [0, 0, 0] and pad_value(torch.float64).dtype == torch.float64


# Mirroring


def test_mirror_by_hand():
    image = np.arange(12, dtype=np.uint8).reshape(1, 4, 3)
    out = Augmenter()({"img": image, "annot": np.array([[0.0, 0, 1, 1, 7]])}, flip_x=1)
    assert out["img"][0].tolist() == [[9, 10, 11], [6, 7, 8], [3, 4, 5], [0, 1, 2]]
    assert out["annot"].tolist() == [[3, 0, 4, 1, 7]]


def test_mirroring_twice_changes_nothing():
    sample = sample_of()
    out = Augmenter()(Augmenter()(sample, flip_x=1), flip_x=1)
    np.testing.assert_array_equal(out["img"], sample["img"])
    np.testing.assert_array_equal(out["annot"], sample["annot"])


def test_half_of_all_samples_are_mirrored():
    sample = sample_of()
    flips = sum(not np.array_equal(Augmenter()(sample)["annot"], sample["annot"]) for _ in range(400))
    assert 150 < flips < 250  # 5 standard deviations
    assert all(np.array_equal(Augmenter()(sample, flip_x=0)["annot"], sample["annot"]) for _ in range(20))


# Mirroring and turning for views from above


def draw(transform, sample, quarters=0, **call):
    """The transform's result if every flip happens and `quarters` is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "rand", lambda: 0.0)
        patch.setattr(np.random, "randint", lambda *bounds: quarters)
        return transform(sample, **call)


@pytest.mark.parametrize(
    ("flip", "quarters", "box", "first_row"),
    [
        # An image 4 wide and 2 high, a box from (0, 0) to (1, 2): its left column. Pixels are 0 1 2 3 / 4 5 6 7.
        ("none", 0, [0, 0, 1, 2], [0, 1, 2, 3]),
        ("horizontal", 0, [3, 0, 4, 2], [3, 2, 1, 0]),
        ("vertical", 0, [0, 0, 1, 2], [4, 5, 6, 7]),
        ("both", 0, [3, 0, 4, 2], [7, 6, 5, 4]),
        ("none", 1, [0, 3, 2, 4], [3, 7]),  # anticlockwise: the left column becomes the bottom row
        ("none", 2, [3, 0, 4, 2], [7, 6, 5, 4]),
        ("none", 3, [0, 0, 2, 1], [4, 0]),
        ("vertical", 1, [0, 3, 2, 4], [7, 3]),
    ],
)
def test_flips_and_turns_by_hand(flip, quarters, box, first_row):
    image = np.repeat(np.arange(8, dtype=np.uint8).reshape(2, 4, 1), 3, axis=2)
    for dtype in (np.float32, np.float64, np.int64):
        sample = {"img": image, "annot": np.array([[0, 0, 1, 2, 5]], dtype=dtype)}
        out = draw(Augmenter(flip, rotate90=True), sample, quarters)
        assert out["annot"].tolist() == [[*box, 5]] and out["annot"].dtype == dtype
        assert out["img"][0, :, 0].tolist() == first_row


def painted(height, width, boxes):
    """A sample with a black image, in which each box [G, 4] of whole pixels is a rectangle of its own colour."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = (number + 1) * 50
    annotations = np.array([[*box, number] for number, box in enumerate(boxes)], dtype=np.float32).reshape(-1, 5)
    return {"img": image, "annot": annotations}


def find(image, number):
    """The box of a rectangle of `painted`, if pixels were only moved."""
    rows, columns = np.nonzero((np.asarray(image) == (number + 1) * 50).all(axis=2))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("size", [(40, 70), (70, 40), (53, 53), (9, 1001)])
@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical", "both"])
def test_rectangles_lie_where_the_boxes_say(flip, quarters, size):
    height, width = size
    boxes = [[0, 0, 3, 5], [width - 8, 2, width - 1, 4], [5, height - 3, 20, height]]
    for dtype in (np.uint8, np.float32):
        sample = painted(height, width, boxes)
        out = draw(Augmenter(flip, rotate90=True), sample | {"img": sample["img"].astype(dtype)}, quarters)
        assert out["annot"][:, :4].tolist() == [find(out["img"], number) for number in range(3)]
        assert out["img"].shape[:2] == (size if quarters % 2 == 0 else size[::-1]) and out["img"].dtype == dtype


@pytest.mark.parametrize("quarters", range(4))
def test_turns_equal_numpys_and_are_exact(quarters):
    image, box = gradient(33, 8191), np.array([[10.25, 3.5, 8100.75, 30.125, 2]], dtype=np.float32)
    out = draw(Augmenter("none", rotate90=True), {"img": image, "annot": box}, quarters)
    np.testing.assert_array_equal(out["img"], np.rot90(image, quarters))
    x1, y1, x2, y2 = box[0, :4].astype(float)
    for _ in range(quarters):
        (x1, y1, x2, y2), image = (y1, image.shape[1] - x2, y2, image.shape[1] - x1), np.rot90(image)
    np.testing.assert_allclose(out["annot"][0, :4], [x1, y1, x2, y2], atol=2**-11)  # half of float32's step there


def test_an_unknown_flip_is_refused():
    with pytest.raises(ValueError, match="none, horizontal, vertical, both, not 'sideways'"):
        Augmenter("sideways")


def test_flips_and_turns_are_drawn_equally_often_and_independently():
    sample, seen = {"img": np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "annot": np.zeros((0, 5))}, Counter()
    for _ in range(640):
        seen[Augmenter("both", rotate90=True)(sample)["img"].tobytes()] += 1
    assert len(seen) == 8 and all(42 < count < 118 for count in seen.values())  # 4.5 standard deviations
    four = {Augmenter("both")(sample)["img"].tobytes() for _ in range(100)}
    two = {Augmenter("vertical")(sample)["img"].tobytes() for _ in range(100)}
    assert len(four) == 4 and len(two) == 2
    assert all(Augmenter("none")(sample) is sample for _ in range(20))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("transform", [Augmenter("both", rotate90=True), LargeScaleJitter(0.1, 2, 48, 64)])
def test_images_one_pixel_wide(transform, size):
    sample = painted(*size, [[0, 0, size[1], size[0]]])
    for _ in range(20):
        out = transform(sample)
        height, width = out.get("size", out["img"].shape[:2])
        boxes = np.asarray(out["annot"])[:, :4]
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()


# Large-scale jitter


def jittered(factor, sample, top=0, left=0, sides=(60, 64)):
    """The result of LargeScaleJitter if this factor and place are drawn."""
    places = iter([top, left])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "uniform", lambda low, high: factor)
        patch.setattr(np.random, "randint", lambda low, high: min(next(places), high - 1))
        out = LargeScaleJitter(0.1, 2, *sides)(sample)
    return out | {key: out[key].numpy() for key in ("img", "annot")}


def test_a_larger_image_is_cropped_by_hand():
    # 120 x 120 px, resized to 60 by Resizer and to 120 at factor 2; the canvas of 64 px holds 64 x 64 of its pixels.
    sample = painted(
        120, 120, [[30, 20, 60, 50], [0, 0, 24, 110], [70, 70, 100, 100], [0, 40, 28, 60], [20, 20, 26, 60]]
    )
    sample["annot"][:, 4] = [0, 1, 2, 3, 4]
    out = jittered(2, sample, top=16, left=25)
    assert tuple(out["img"].shape) == (64, 64, 3) and out["size"] == (64, 64) and out["scale"] == 2 * 0.5
    np.testing.assert_array_equal(out["img"], sample["img"][16:80, 25:89])
    # Box 1 lies left of the crop. Left of box 2 is 19 x 10 of 30 x 30, more than a tenth; of box 3, 3 / 28; of box 4, a
    # sixth, 1 px.
    assert out["annot"].tolist() == [[5, 4, 35, 34, 0], [45, 54, 64, 64, 2], [0, 24, 3, 44, 3], [0, 4, 1, 44, 4]]
    assert out["annot"].dtype == np.float32


def test_a_box_with_too_little_of_its_area_left_is_dropped():
    boxes = [[0, 0, 30, 10], [0, 20, 29, 30]]  # right of x = 27: 3 / 30, which is kept; 2 / 29, which is dropped
    out = jittered(2, painted(120, 120, boxes), left=27)
    assert out["annot"].tolist() == [[0, 0, 3, 10, 0]]


def test_a_smaller_image_is_padded_by_hand():
    sample = painted(100, 120, [[20, 40, 60, 80], [0, 0, 1, 50]])
    out = jittered(0.5, sample)  # Resizer: 64 / 120; here half of that, 27 x 32 px
    assert out["size"] == (27, 32) and out["scale"] == pytest.approx(0.5 * 64 / 120)
    # Scaled by 32 / 120 and 27 / 100, as the pixels are; the second box is a quarter of a pixel wide.
    np.testing.assert_allclose(out["annot"], [[20 * 32 / 120, 40 * 0.27, 60 * 32 / 120, 80 * 0.27, 0]], rtol=1e-6)
    assert (out["img"][27:] == pad_value(torch.uint8).numpy()).all()
    assert (out["img"][:, 32:] == pad_value(torch.uint8).numpy()).all() and (out["img"][:27, :32] < 60).all()


@pytest.mark.parametrize("factor", [0.1, 0.37, 1, 1.3, 2, 5])
@pytest.mark.parametrize("size", [(90, 150), (150, 90), (640, 480), (33, 2000)])
def test_a_painted_rectangle_is_found_on_the_canvas(size, factor):
    height, width = size
    box = [width // 4, height // 5, width // 4 + width // 3, height // 5 + height // 2]
    out = jittered(factor, painted(height, width, [box]), top=height // 5, left=width // 6, sides=(96, 128))
    assert out["img"].shape == (128, 128, 3)
    rows, columns = np.nonzero((np.abs(out["img"].astype(int) - 50) <= 20).all(axis=2))
    if len(out["annot"]):
        (x1, y1, x2, y2, _), (rest_height, rest_width) = out["annot"][0], out["size"]
        assert 0 <= x1 < x2 <= rest_width and 0 <= y1 < y2 <= rest_height
        if min(x2 - x1, y2 - y1) > 3:
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.subtract(found, [x1, y1, x2, y2])).max() <= 1  # antialiasing


def test_factor_1_is_the_size_of_detection():
    sample = {"img": gradient(100, 130), "annot": np.array([[10, 10, 60, 60, 0]], dtype=np.float32)}
    out, plain = jittered(1, sample, sides=(60, 96)), Resizer(60, 96)(sample)
    height, width = plain["size"]
    assert out["size"] == plain["size"] and out["scale"] == plain["scale"]
    np.testing.assert_array_equal(out["img"][:height, :width], plain["img"][:height, :width])


def test_factors_are_drawn_from_the_range_and_any_canvas_is_square():
    sample = sample_of(boxes=[])
    outs = [LargeScaleJitter(0.5, 1.5, 20, 50)(sample) for _ in range(100)]
    assert {out["img"].shape for out in outs} == {(64, 64, 3)}  # 50, rounded up
    scales = [out["scale"] / (20 / 48) for out in outs]
    assert 0.5 <= min(scales) < 0.6 and 1.4 < max(scales) <= 1.5


def test_boxes_of_whole_numbers_are_not_rounded():
    sample = painted(100, 120, [[21, 41, 60, 80]])
    out = jittered(0.5, sample | {"annot": sample["annot"].astype(int)})
    np.testing.assert_array_equal(out["annot"], jittered(0.5, sample)["annot"])


def test_memory_does_not_grow_with_the_factor():
    out = jittered(1e6, sample_of(), top=10, left=10)
    assert out["img"].shape == (64, 64, 3)


# Transforms of torchvision's v2


def test_v2_transforms_move_boxes_with_pixels():
    compose = v2.Compose([v2.RandomHorizontalFlip(1), v2.RandomVerticalFlip(1), v2.Pad((3, 0, 0, 7))])
    out = V2(compose)(painted(40, 70, [[0, 0, 3, 5], [30, 10, 50, 15]]))
    assert out["annot"].tolist() == [[70, 35, 73, 40, 0], [23, 25, 43, 30, 1]]
    assert out["annot"][:, :4].tolist() == [find(out["img"], number) for number in range(2)]
    assert out["annot"].dtype == np.float32 and out["img"].shape == (47, 73, 3)


class Cut(v2.Transform):
    def transform(self, part, params):
        return v2.functional.crop(part, 15, 20, 20, 30)  # y from 15 to 35, x from 20 to 50


def test_boxes_that_v2_transforms_move_out_of_the_image_are_dropped():
    sample = painted(40, 70, [[0, 0, 30, 10], [40, 20, 60, 40], [5, 20, 25, 40], [5, 20, 20, 40]])
    sample["annot"][:, 4] = [6, 7, 8, 9]
    assert V2(Cut())(sample)["annot"].tolist() == [[20, 5, 30, 20, 7], [0, 5, 5, 20, 8]]


def test_v2_transforms_may_drop_boxes_and_change_dtypes():
    compose = [
        v2.SanitizeBoundingBoxes(min_size=6),
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
    ]
    out = V2(v2.Compose(compose))(painted(40, 70, [[0, 0, 3, 5], [30, 10, 50, 25]]))
    assert out["annot"].tolist() == [[30, 10, 50, 25, 1]] and out["img"].dtype == np.float32 and out["img"].max() <= 1


def test_v2_transforms_may_change_the_kind_of_image_and_the_format_of_boxes():
    sample = painted(40, 70, [[0, 0, 3, 5], [30, 10, 50, 25]])
    out = V2(v2.Compose([v2.ToPILImage(), v2.ConvertBoundingBoxFormat("CXCYWH")]))(sample)
    np.testing.assert_array_equal(out["img"], sample["img"])
    np.testing.assert_array_equal(out["annot"], sample["annot"])


# Resizing


@pytest.mark.parametrize(
    ("height", "width", "size", "padded"),
    [
        (48, 64, (60, 80), (64, 96)),  # by the short side
        (64, 48, (80, 60), (96, 64)),
        (30, 120, (40, 160), (64, 160)),  # by the long side
        (60, 160, (60, 160), (64, 160)),
        (7, 1000, (1, 160), (32, 160)),
    ],
)
def test_sizes_by_hand(height, width, size, padded):
    out = Resizer(min_side=60, max_side=160)(sample_of(height, width))
    assert out["size"] == size
    assert tuple(out["img"].shape) == (*padded, 3)
    assert out["scale"] == pytest.approx(min(60 / min(height, width), 160 / max(height, width)))
    assert resized_size(height, width, 60, 160) == (out["scale"], size, padded)


def test_a_missing_limit_does_not_count():
    assert resized_size(100, 200, 50, None)[:2] == (0.5, (50, 100))
    assert resized_size(100, 200, None, 50)[:2] == (0.25, (25, 50))
    assert resized_size(100, 200, None, None)[:2] == (1.0, (100, 200))


@pytest.mark.parametrize("side", [32, 64, 96])
def test_nothing_is_padded_where_32_divides_the_size(side):
    out = Resizer(min_side=side, max_side=2 * side)(sample_of(40, 80))  # the original: 32 px more
    assert tuple(out["img"].shape) == (side, 2 * side, 3) and out["size"] == (side, 2 * side)


def test_defaults_are_608_and_1024():
    assert Resizer()(sample_of(40, 40))["size"] == (608, 608)
    assert Resizer()(sample_of(20, 80))["size"] == (256, 1024)


def test_sides_can_be_given_with_the_call():
    assert Resizer()(sample_of(40, 40), min_side=32, max_side=64)["size"] == (32, 32)


def test_an_image_of_the_right_size_is_unchanged():
    sample = sample_of(64, 96)
    out = Resizer(min_side=64, max_side=96)(sample)
    np.testing.assert_array_equal(out["img"], sample["img"])
    np.testing.assert_array_equal(out["annot"], sample["annot"])
    assert out["scale"] == 1


@pytest.mark.parametrize("min_side", [37, 150])
def test_resizing_equals_pillow(min_side):
    image = np.random.default_rng(0).integers(0, 256, (75, 111, 3), dtype=np.uint8)
    out = Resizer(min_side, 1000)({"img": image, "annot": np.zeros((0, 5))})
    height, width = out["size"]
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(out["img"][:height, :width].numpy() - expected).max() <= 1


def test_padding_has_the_mean_colour():
    out = Resizer(min_side=60, max_side=160)(sample_of(48, 64))  # 60 x 80 in 64 x 96
    mean = pad_value(torch.uint8)
    assert (out["img"][60:] == mean).all() and (out["img"][:, 80:] == mean).all()
    assert not (out["img"][:60, :80] == mean).all(dim=2).all()


def test_boxes_move_with_the_image():
    image = np.zeros((50, 80, 3), dtype=np.uint8)
    image[10:30, 20:60] = 255
    annotation = np.array([[20, 10, 60, 30, 4]], dtype=np.float32)
    out = Resizer(min_side=100, max_side=1000)({"img": image, "annot": annotation})
    assert out["annot"].tolist() == [[40, 20, 120, 60, 4]]
    white = (out["img"][:100, :160] > 127).all(dim=2).nonzero()
    assert white.min(dim=0).values.tolist() == [20, 40] and (white.max(dim=0).values + 1).tolist() == [60, 120]


def test_the_originals_order_of_transforms_works():
    out = Compose([Normalizer(), Augmenter(), Resizer(64, 96)])(sample_of())
    assert out["img"].dtype == torch.float32 and tuple(out["img"].shape) == (64, 96, 3)
    assert (out["img"][:, 86:] == 0).all()  # 64 * 64 / 48 = 85.3
    torch.testing.assert_close(out["annot"][:, 4], torch.tensor([1.0, 0.0]))


# Every transform


def mirror(sample):
    return Augmenter()(sample, flip_x=1)


def turn(sample):
    return draw(Augmenter("none", rotate90=True), sample, quarters=1)


TRANSFORMS = [
    *(
        Normalizer(),
        mirror,
        turn,
        Resizer(60, 160),
        Resizer(48, 64),
        RandomCrop(0.9),
        LargeScaleJitter(0.9, 1.1, 60, 160),
    ),
    V2(v2.RandomHorizontalFlip(1)),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_input_stays_as_it_was(transform):
    sample = sample_of()
    before = copy.deepcopy(sample)
    out = transform(sample)
    for array in (out["img"], out["annot"]):
        if array is not sample["annot"]:  # Normalizer keeps the boxes
            array[:] = 0
    assert sample.keys() == before.keys()
    np.testing.assert_array_equal(sample["img"], before["img"])
    np.testing.assert_array_equal(sample["annot"], before["annot"])


@pytest.mark.parametrize("transform", TRANSFORMS[1:])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_the_dtype_is_kept(transform, dtype):
    image = np.asarray(transform(sample_of(dtype=dtype))["img"])
    assert image.dtype == dtype
    assert image.max() > 100  # and the range of values with it


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_image_without_boxes_is_accepted(transform):
    assert tuple(transform(sample_of(boxes=[]))["annot"].shape) == (0, 5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_other_entries_are_kept(transform):
    assert transform(sample_of())["index"] == 3


# Opt-in augmentations


def test_a_crop_by_hand(monkeypatch):
    monkeypatch.setattr(np.random, "uniform", lambda low, high, size: np.array([0.5, 0.75]))  # 32 wide, 36 high
    starts = iter([20, 4])  # x, y
    monkeypatch.setattr(np.random, "randint", lambda low, high: next(starts))
    sample = sample_of(boxes=[[10, 8, 40, 44, 1], [4, 8, 24, 40, 2], [50, 10, 56, 20, 0]])
    cropped = RandomCrop(0.5)(sample)
    assert cropped["img"].shape == (36, 32, 3)
    np.testing.assert_array_equal(cropped["img"], sample["img"][4:40, 20:52])
    # Centres: (25, 26) inside, clipped on three sides; (14, 24) and (53, 15) outside.
    assert cropped["annot"].tolist() == [[0, 4, 20, 36, 1]] and cropped["annot"].dtype == np.float32
    assert cropped["index"] == 3 and len(sample["annot"]) == 3


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_keeps_its_share_and_the_boxes_inside(seed):
    np.random.seed(seed)
    cropped = RandomCrop(0.4)(sample_of())
    height, width = cropped["img"].shape[:2]
    assert 0.4 * 48 - 0.5 <= height <= 48 and 0.4 * 64 - 0.5 <= width <= 64
    boxes = cropped["annot"][:, :4]
    assert len(boxes) >= 1 and (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_a_crop_never_loses_all_boxes_and_takes_images_without_any():
    corner = sample_of(boxes=[[0, 0, 2, 2, 1]])
    assert all(len(RandomCrop(0.05)(corner)["annot"]) == 1 for _ in range(50))
    empty = RandomCrop(0.5)(sample_of(boxes=[]))
    assert empty["annot"].shape == (0, 5)


def test_colour_jitter_changes_colours_alone():
    sample = sample_of()
    before = copy.deepcopy(sample)
    seen = {ColourJitter(0.4)(sample)["img"].tobytes() for _ in range(5)}
    assert len(seen) == 5
    changed = ColourJitter(0.4)(sample)
    assert changed["img"].dtype == np.uint8 and changed["img"].shape == sample["img"].shape
    np.testing.assert_array_equal(changed["annot"], sample["annot"])
    np.testing.assert_array_equal(sample["img"], before["img"])
    assert np.abs(ColourJitter(0.0)(sample)["img"].astype(int) - sample["img"]).max() <= 2  # by rounding


def test_colour_jitter_refuses_normalised_pixels():
    with pytest.raises(SampleError, match="img must be uint8"):
        ColourJitter(0.4)(Normalizer()(sample_of()))


def test_scale_jitter_draws_short_sides_from_its_range():
    sides = {min(Resizer((40, 43), 128)(sample_of())["size"]) for _ in range(60)}
    assert sides == {40, 41, 42, 43}
    assert max(Resizer([100, 100], 80)(sample_of())["size"]) == 80


@pytest.mark.parametrize("transform", [Resizer(32, 64), lambda sample: Augmenter()(sample, flip_x=1)])
def test_views_with_negative_strides_are_accepted(transform):  # such as a user's own flip leaves
    image = np.random.randint(0, 256, (40, 50, 3), dtype=np.uint8)
    boxes = np.zeros((0, 5), dtype=np.float32)
    view, copy_of_it = (
        transform({"img": img, "annot": boxes})["img"] for img in (image[:, ::-1], image[:, ::-1].copy())
    )
    assert np.array_equal(np.asarray(view), np.asarray(copy_of_it))
