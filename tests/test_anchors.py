import pytest
import torch
from conftest import load_golden

from retinanet.anchors import Anchors, anchors_for_shape, compute_shape, generate_anchors, shift

GOLDEN = load_golden("anchors")
SIZES = [(64, 96), (256, 320), (333, 500), (640, 832)]


@pytest.mark.parametrize("base", [32, 512])
def test_anchors_of_a_location_equal_the_originals(base):
    torch.testing.assert_close(generate_anchors(base).double(), GOLDEN[f"base_{base}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("height, width", SIZES)
def test_anchors_of_an_image_equal_the_originals(height, width):
    anchors = Anchors()(torch.empty(2, 3, height, width))
    name = f"{height}x{width}"
    assert anchors.shape == (1, GOLDEN[f"count_{name}"], 4)
    torch.testing.assert_close(anchors[0, ::997], GOLDEN[f"every997_{name}"], atol=1e-3, rtol=0)
    torch.testing.assert_close(anchors[0].double().sum(dim=0), GOLDEN[f"sum_{name}"], atol=1.0, rtol=0)


def test_all_anchors_of_a_small_image_equal_the_originals():
    torch.testing.assert_close(Anchors()(torch.empty(1, 3, 64, 96))[0], GOLDEN["all_64x96"], atol=1e-3, rtol=0)


def test_paper_sizes_and_shapes():
    boxes = generate_anchors(32)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = [(32 * 2 ** (octave / 3)) ** 2 for octave in range(3)] * 3
    assert (width * height).tolist() == pytest.approx(areas, rel=1e-5)
    assert (height / width).tolist() == pytest.approx([0.5] * 3 + [1] * 3 + [2] * 3, rel=1e-5)


def test_every_argument_is_honoured():  # the original ignored sizes, and broke when any was given
    anchors = Anchors(pyramid_levels=[3, 4], strides=[8, 20], sizes=[10, 50], ratios=[1], scales=[1, 2])
    boxes = anchors(torch.empty(1, 3, 40, 40))[0]
    assert anchors.num_anchors == 2
    assert len(boxes) == (5 * 5 + 2 * 2) * 2
    assert boxes[0].tolist() == [4 - 5, 4 - 5, 4 + 5, 4 + 5]
    assert boxes[-1].tolist() == [30 - 50, 30 - 50, 30 + 50, 30 + 50]
    assert torch.equal(Anchors(**anchors.settings())(torch.empty(1, 3, 40, 40))[0], boxes)


@pytest.mark.parametrize("settings", [{"sizes": [32]}, {"strides": [8, 16]}, {"ratios": [0, 1, 2]}, {"scales": [-1]}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"anchor|levels"):
        Anchors(**settings)


def test_level_shapes_sum_to_all_anchors():
    anchors = Anchors()
    locations = sum(rows * columns for rows, columns in anchors.level_shapes(333, 500))
    assert sum(anchors.level_sizes(333, 500)) == 9 * locations
    assert locations * 9 == anchors(torch.empty(1, 3, 333, 500)).shape[1]


def test_nothing_is_saved():
    assert not Anchors().state_dict()


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_anchors_keep_their_precision(change):
    expected = Anchors()(torch.zeros(1, 3, 64, 96))
    assert torch.equal(change(Anchors())(torch.zeros(1, 3, 64, 96)), expected)


def test_a_network_built_without_memory_has_its_anchors():
    with torch.device("meta"):
        anchors = Anchors()
    assert torch.equal(anchors.cells, Anchors().cells)


def test_the_originals_functions_are_the_parts_of_anchors():
    assert compute_shape((333, 500, 3), [3, 4, 5, 6, 7]) == Anchors().level_shapes(333, 500)
    cells = generate_anchors(32)
    by_hand = shift((2, 3), 8, cells)
    assert by_hand.shape == (2 * 3 * 9, 4)
    torch.testing.assert_close(by_hand[9 * 5 : 9 * 6], cells + torch.tensor([20.0, 12.0, 20.0, 12.0]))
    torch.testing.assert_close(anchors_for_shape((64, 96, 3)), GOLDEN["all_64x96"], atol=1e-3, rtol=0)
