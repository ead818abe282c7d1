import numpy as np
import pytest

from retinanet.data.shapes import ShapesDataset, draw_shapes


def ink(image):
    return (image != 255).any(axis=2)


@pytest.fixture(scope="module")
def drawn():
    return [draw_shapes(64, seed) for seed in range(30)]


def test_a_set_without_images_is_refused():
    with pytest.raises(ValueError, match="num_images must be at least 1, not 0"):
        ShapesDataset(0)


def test_the_same_seed_draws_the_same_images():
    first, second = (ShapesDataset(3, seed=5, size=48) for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.annotations, second.annotations)


def test_all_images_of_all_seeds_differ():
    images = [image.tobytes() for seed in (0, 1) for image in ShapesDataset(6, seed=seed, size=48).images]
    assert len(set(images)) == 12


def test_a_larger_set_starts_with_the_same_images():
    few, many = ShapesDataset(2, seed=3, size=48), ShapesDataset(4, seed=3, size=48)
    np.testing.assert_array_equal(few.images, many.images[:2])


def test_boxes_hold_all_ink_and_fit_to_the_pixel(drawn):
    for image, rows in drawn:
        inked = ink(image)
        covered = np.zeros_like(inked)
        for x1, y1, x2, y2 in rows[:, :4].astype(int):
            box = inked[y1:y2, x1:x2]
            assert box[0].any() and box[-1].any() and box[:, 0].any() and box[:, -1].any()
            covered[y1:y2, x1:x2] = True
        assert not inked[~covered].any()


def test_the_share_of_ink_in_a_box_is_that_of_its_class():
    shares = {0: [], 1: [], 2: []}
    for seed in range(30):
        image, rows = draw_shapes(160, seed)
        inked = ink(image)
        for x1, y1, x2, y2, label in rows.astype(int):
            shares[label].append(inked[y1:y2, x1:x2].mean())
    assert min(len(share) for share in shares.values()) >= 5  # all three classes occur
    assert set(shares[1]) == {1}  # rectangle
    assert np.median(shares[0]) == pytest.approx(np.pi / 4, abs=0.03)  # circle
    assert np.median(shares[2]) == pytest.approx(1 / 2, abs=0.03)  # triangle


def test_an_image_has_one_to_four_shapes_that_are_large_enough(drawn):
    assert {1, 3} <= {len(rows) for _, rows in drawn} <= {1, 2, 3, 4}
    for _, rows in drawn:
        assert (rows[:, 2:4] - rows[:, :2]).min() >= 64 // 5


def test_samples_follow_the_contract():
    data = ShapesDataset(2, size=40)
    sample = data[1]
    assert sample["img"].shape == (40, 40, 3) and sample["img"].dtype == np.uint8
    assert sample["annot"].dtype == np.float32 and sample["annot"].shape[1] == 5
    assert len(data) == 2 and data.num_classes() == 3 and data.label_to_name(2) == "triangle"
    assert data.image_aspect_ratio(0) == 1


def test_each_image_has_its_own_boxes():
    data = ShapesDataset(5, seed=1, size=48)
    for index in range(5):
        np.testing.assert_array_equal(data[index]["img"], draw_shapes(48, [1, index])[0])
        np.testing.assert_array_equal(data[index]["annot"], draw_shapes(48, [1, index])[1])


def test_changing_a_sample_does_not_change_the_data():
    data = ShapesDataset(1, size=40)
    before = data[0]["img"].copy()
    data[0]["img"][:] = 0
    np.testing.assert_array_equal(data[0]["img"], before)


def test_a_transform_is_applied():
    assert ShapesDataset(1, size=40, transform=lambda sample: {**sample, "ten": 10})[0]["ten"] == 10
