import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import gradient, save, write_clip, write_coco_data
from PIL import Image
from torch import nn

import retinanet
from retinanet.boxes import box_iou
from retinanet.data.coco import CocoDataset
from retinanet.data.images import read_image
from retinanet.data.shapes import ShapesDataset
from retinanet.data.transforms import Resizer, normalize
from retinanet.data.video import Video
from retinanet.detection import detect, detect_images
from retinanet.errors import UserError
from retinanet.evaluation.coco import evaluate_coco, read_results, to_detections
from retinanet.evaluation.voc import evaluate
from retinanet.inference import Prediction, as_array, detection_limits, predict
from retinanet.postprocess import Detections
from retinanet.training import checkpoint

LIMITS = {"score_threshold": 0.05, "max_detections": 20, "min_side": 96, "max_side": 160}


def assert_same(a, b):
    for left, right in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)
    assert a.class_names == b.class_names


def test_the_package_exports_it_and_stays_light():
    code = (
        "import sys, retinanet; from retinanet import model; "
        "heavy = {'matplotlib', 'pycocotools', 'skimage', 'scipy'} & set(sys.modules); "
        "retinanet.predict; heavy |= {'matplotlib', 'pycocotools', 'skimage', 'scipy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert retinanet.predict is predict
    with pytest.raises(AttributeError, match="nonsense"):
        _ = retinanet.nonsense


def test_all_kinds_of_images_give_the_same(filled_net, tmp_path):
    array = gradient(64, 90)
    path = save(array, tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [
        path,
        tmp_path / "a.png",
        array,
        Image.fromarray(array),
        tensor,
        tensor / 255,
        array.astype(np.float64) / 255,
    ]
    predictions = predict(filled_net, kinds, **LIMITS)
    assert len(predictions) == len(kinds) and len(predictions[0].scores) > 0
    for prediction in predictions:
        assert_same(prediction, predictions[0])
    assert_same(predict(filled_net, path, **LIMITS)[0], predictions[0])
    assert_same(predict(filled_net, tensor[None].repeat(2, 1, 1, 1), **LIMITS)[1], predictions[0])


def test_boxes_are_pixels_of_the_image(filled_net):
    array = gradient(64, 90)
    prediction = predict(filled_net, array, **LIMITS)[0]
    resized = Resizer(96, 160)({"img": array, "annot": np.zeros((0, 5))})
    images = normalize(resized["img"].permute(2, 0, 1)[None])
    expected = filled_net.detect(images, 0.05, max_detections=20, image_sizes=[resized["size"]])[0]
    assert prediction.boxes.dtype == torch.float32 and len(prediction.boxes) == len(expected.boxes)
    torch.testing.assert_close(prediction.boxes, expected.boxes / resized["scale"], atol=0.02, rtol=0)
    assert (prediction.boxes >= 0).all()
    assert prediction.boxes[:, 2].max() <= 90 and prediction.boxes[:, 3].max() <= 64
    assert prediction.class_names == [str(label) for label in prediction.labels.tolist()]


def test_images_of_all_sizes_come_back_in_order_and_do_not_affect_each_other(filled_net):
    images = [gradient(64, 90), gradient(64, 90)[::-1], gradient(90, 64), gradient(64, 90), gradient(50, 50)]
    together = predict(filled_net, iter(images), batch_size=4, **LIMITS)
    for image, prediction in zip(images, together, strict=True):
        assert_same(prediction, predict(filled_net, image, **LIMITS)[0])


def test_names_and_sizes_are_those_of_the_checkpoint(filled_net, tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, checkpoint.model_entries(filled_net, ["cat", "dog", "bird"], 96, 160))
    array = gradient(64, 90)
    prediction = predict(path, array, score_threshold=0.05, max_detections=20, device="cpu")[0]
    expected = predict(filled_net, array, class_names=["cat", "dog", "bird"], **LIMITS)[0]
    assert_same(prediction, expected)
    assert set(prediction.class_names) <= {"cat", "dog", "bird"}
    assert_same(predict(checkpoint.load_model(path), array, 0.05, 20)[0], expected)


def kept(prediction, keep):
    """The detections that `keep` [N] selects."""
    names = [name for name, chosen in zip(prediction.class_names, keep, strict=True) if chosen]
    return Prediction(*(values[keep] for values in prediction[:3]), names)


def test_limits_are_those_of_the_checkpoint_unless_given(filled_net, tmp_path):
    stored = {"score_threshold": 0.02, "nms_threshold": 0.2, "top_k": 30, "max_detections": 8}
    path, array = tmp_path / "model.pt", gradient(64, 90)
    checkpoint.save(path, checkpoint.model_entries(filled_net, ["cat", "dog", "bird"], 96, 160, stored))
    net, info = checkpoint.load_model(path)
    assert info["limits"] == stored and detection_limits(info, {}) == stored
    assert detection_limits(info, {"top_k": None, "score_threshold": 0.3}) == stored | {"top_k": None} | {
        "score_threshold": 0.3
    }
    assert detection_limits({}, {}) == checkpoint.LIMITS
    found = predict((net, info), array, 0.02)[0]
    names = {"class_names": ["cat", "dog", "bird"], "min_side": 96, "max_side": 160}
    assert len(found.scores) == 8
    assert_same(found, predict(filled_net, array, **stored, **names)[0])
    wider = predict((net, info), array, 0.02, None, nms_threshold=0.5, top_k=None)[0]
    assert len(wider.scores) > 30
    assert_same(wider, predict(filled_net, array, 0.02, None, top_k=None, **names)[0])
    assert (predict((net, info), array)[0].scores > 0.5).all()  # it has no best scores


def test_the_best_scores_hold_class_by_class(filled_net, tmp_path):
    path, array = tmp_path / "model.pt", gradient(64, 90)
    every = predict(filled_net, array, 0.01, class_names=["cat", "dog", "bird"], min_side=96, max_side=160)[0]
    middle = [float(every.scores[every.labels == label].median()) for label in range(2)]
    best = {"all": 0.15, "classes": dict(zip(["cat", "dog"], middle, strict=True))}
    checkpoint.save(path, checkpoint.model_entries(filled_net, ["cat", "dog", "bird"], 96, 160, score_thresholds=best))
    expected = kept(every, every.scores > torch.tensor([*middle, 0.15])[every.labels])
    assert 0 < len(expected.scores) < len(every.scores) and len(expected.labels.unique()) > 1
    for options in ({}, {"score_threshold": "best"}):
        assert_same(predict(path, array, device="cpu", **options)[0], expected)
    assert_same(predict(path, array, 0.01, device="cpu")[0], every)
    assert torch.equal(predict(path, array, device="cpu", class_names=["a", "b", "c"])[0].labels, expected.labels)
    with pytest.raises(UserError, match="score threshold best: the checkpoint holds no scores of the best F1"):
        predict(filled_net, array, "best")


def test_a_stream_is_read_a_batch_ahead_and_fails_where_it_breaks(filled_net):
    images, read = [gradient(64, 90), gradient(64, 90)[::-1]] * 2 + [gradient(50, 70)], []

    def reader():
        for number, image in enumerate([*images, np.zeros((4, 5, 2), np.uint8), images[0]]):
            read.append(number)
            yield image

    found, expected = (
        predict(filled_net, reader(), batch_size=2, stream=True, **LIMITS),
        iter(predict(filled_net, images, **LIMITS)),
    )
    assert read == []
    assert_same(next(found), next(expected))
    assert read == [0, 1]
    for prediction, ahead in zip([next(found) for _ in range(2)], (3, 3), strict=True):
        assert_same(prediction, next(expected))
        assert max(read) == ahead
    assert_same(next(found), next(expected))
    assert_same(next(found), next(expected))  # the fifth is found, although the sixth is not an image
    with pytest.raises(ValueError, match="channels"):
        next(found)
    assert read == list(range(6)) and next(found, None) is None
    assert isinstance(predict(filled_net, images[:1], **LIMITS), list)


def test_images_may_come_in_memory_that_is_reused(filled_net):
    images, memory = [gradient(64, 90), gradient(64, 90)[::-1]], np.zeros((64, 90, 3), np.uint8)

    def reader():
        for image in images:
            memory[:] = image
            yield memory

    for found, expected in zip(
        predict(filled_net, reader(), **LIMITS), predict(filled_net, images, **LIMITS), strict=True
    ):
        assert_same(found, expected)


def test_a_video_is_its_frames(filled_net, tmp_path):
    pytest.importorskip("av", reason="NO TEST OF VIDEOS: pip install av")
    path = write_clip(tmp_path / "a.mp4", range(3), size=(64, 90))
    found = predict(filled_net, path, stream=True, **LIMITS)
    expected = predict(filled_net, [frame.image for frame in Video(path)], **LIMITS)
    assert len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    with pytest.raises(UserError, match=r"nowhere\.mp4: the file does not exist"):
        predict(filled_net, tmp_path / "nowhere.mp4", stream=True)


PREDICTION = Prediction(
    torch.tensor([0.87654321, 0.25]),
    torch.tensor([1, 0]),
    torch.tensor([[1, 2, 30.5, 40.00049], [0, 0, 3, 4]]),
    ["b", "a"],
)


def test_detections_for_coco_are_those_that_validate_reads(tmp_path):
    ids = {0: 17, 1: 3}
    results = PREDICTION.to_coco(np.int64(42), ids)
    assert results == [
        {"image_id": 42, "category_id": 3, "bbox": [1, 2, 29.5, 38.0], "score": 0.876543},
        {"image_id": 42, "category_id": 17, "bbox": [0, 0, 3, 4], "score": 0.25},
    ]
    assert [row["category_id"] for row in PREDICTION.to_coco(0)] == [1, 0]
    (tmp_path / "found.json").write_text(json.dumps(results))
    dataset = CocoDataset(write_coco_data(tmp_path), "val2017")
    assert dataset.coco_labels == {0: 3, 1: 17}
    read = to_detections(dataset, read_results(dataset, tmp_path / "found.json"))[dataset.image_ids.index(42)]
    assert read.labels.tolist() == [0, 1]
    torch.testing.assert_close(read.boxes.float(), PREDICTION.boxes, rtol=0, atol=1e-3)
    empty = Prediction(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), [])
    assert empty.to_coco(7) == []
    with pytest.raises(TypeError, match="integer"):
        PREDICTION.to_coco("a.jpg")


def test_detections_for_supervision(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    found = PREDICTION.to_supervision()
    assert found.xyxy.shape == (2, 4) and found.xyxy.dtype == found.confidence.dtype == np.float32
    assert found.class_id.tolist() == [1, 0] and found.data["class_name"].tolist() == ["b", "a"]
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        PREDICTION.to_supervision()


def test_detect_images_keeps_the_mode(filled_net):
    assert not filled_net.training
    filled_net.train()
    filled_net.freeze_bn()
    try:
        list(detect_images(filled_net, [gradient(40, 40)], Resizer(64, 64)))
        assert filled_net.training
    finally:
        filled_net.freeze_bn(False)
        filled_net.eval()


def test_a_file_is_turned_upright_and_a_pillow_image_is_not(filled_net, tmp_path):
    array = gradient(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(array, tmp_path / "a.jpg", quality=95, exif=exif)
    assert as_array(path).shape == (60, 40, 3)
    np.testing.assert_array_equal(as_array(path), read_image(path))
    upright = predict(filled_net, path, **LIMITS)[0]
    assert_same(upright, predict(filled_net, as_array(path).copy(), **LIMITS)[0])
    assert len(upright.boxes) > 0 and upright.boxes[:, 2].max() <= 40 < upright.boxes[:, 3].max() <= 60
    with Image.open(path) as image:
        assert as_array(image).shape == (40, 60, 3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pillow_images_of_any_mode(mode):
    assert as_array(Image.new(mode, (7, 5))).shape == (5, 7, 3)


def test_grey_alpha_and_16_bits():
    grey = np.array([[0, 128], [255, 7]], dtype=np.uint8)
    np.testing.assert_array_equal(as_array(grey), np.repeat(grey[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(as_array(grey.astype(np.uint16) * 257, (0, 65535)), as_array(grey))
    np.testing.assert_array_equal(as_array(Image.fromarray(grey.astype(np.uint16) * 16), (0, 4080)), as_array(grey))
    rgba = np.dstack([gradient(3, 4), np.full((3, 4), 9, np.uint8)])
    np.testing.assert_array_equal(as_array(rgba), gradient(3, 4))
    np.testing.assert_array_equal(as_array(torch.from_numpy(grey)[None]), as_array(grey))
    assert as_array(torch.rand(3, 4, 5, dtype=torch.bfloat16)).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3)) - 0.1, "0 to 1"),
        (np.full((4, 5, 3), np.nan), "0 to 1"),
        (torch.randn(3, 4, 5) * 3, "0 to 1"),
        (np.zeros((4, 5, 3), dtype=np.int64), "int64"),
        (np.zeros((4, 5, 2), dtype=np.uint8), "channels"),
        (torch.zeros(8, 5, 3), "first in a tensor"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "an image must be"),
        (42, "an image must be"),
    ],
)
def test_what_is_not_an_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        as_array(image)


def test_a_missing_file_is_named(filled_net):
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        predict(filled_net, "nowhere.jpg")


def test_other_arguments_of_predict(filled_net):
    image = gradient(64, 96)
    expected = predict(filled_net, image, 0.02, min_side=64)[0]
    for wrapped in (nn.DataParallel(filled_net), torch.compile(filled_net), torch.compile(nn.DataParallel(filled_net))):
        found = predict(wrapped, image, 0.02, min_side=64, precision="fp32")[0]
        assert len(found.scores) > 3 and torch.equal(found.boxes, expected.boxes)
    for names in (["cat"], "cat", ["a", "b", "c", "d"]):  # "cat" has three letters, and the model three classes
        with pytest.raises(ValueError, match="class_names must be 3 names"):
            predict(filled_net, image, class_names=names)
    assert "predict" in dir(retinanet)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_side": -5, "batch_size": 0}, "batch_size must be from 1 to 65,536, not 0; min_side must be from 1"),
        ({"score_threshold": "x"}, "score_threshold must be a number, not 'x'"),
        ({"nms_threshold": 2}, "nms_threshold must be from 0 to 1, not 2"),
        ({"max_detections": -1}, "max_detections must be from 1"),
        ({"precision": "fp99"}, "precision must be one of auto, fp32, bf16, fp16, not 'fp99'"),
    ],
)
def test_a_wrong_argument_of_predict_is_one_message(filled_net, arguments, message):
    with pytest.raises(UserError, match=message):
        predict(filled_net, gradient(64, 96), stream=True, **arguments)


@pytest.mark.parametrize("model", [None, nn.Linear(2, 2), (nn.Linear(2, 2),), {"conv1.weight": torch.zeros(1)}])
def test_a_wrong_model_is_one_message(model):
    with pytest.raises(UserError, match="model must be a path, a RetinaNet or the result of load_model, not"):
        predict(model, gradient(64, 96))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_types_and_callers_of_another_default_type(filled_net, dtype):
    image, limits = gradient(64, 96), {"score_threshold": 0.02, "min_side": 64}
    best = [values[:1] for values in predict(filled_net, image, **limits)[0][:3]]
    net, data = copy.deepcopy(filled_net).to(dtype), ShapesDataset(1, transform=Resizer(64, 64))
    for precision in ("fp32", "bf16"):
        found = predict(net, image, precision=precision, **limits)[0]
        assert found.scores.dtype == found.boxes.dtype == torch.float32
        assert (box_iou(found.boxes, best[2])[found.labels == best[1]] > 0.8).any()
    assert 0 <= evaluate_coco(data, net)["AP"] <= 1 and len(evaluate(data, nn.DataParallel(net))) == 3
    torch.set_default_dtype(dtype)
    try:
        again = predict(filled_net, image, **limits)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(values[:1], expected) for values, expected in zip(again[:3], best, strict=True))


# Data sets


class Finder(nn.Module):
    """Finds one box per image, with the image's mean as its score."""

    error = None

    def detect(self, images, image_sizes):
        assert not self.training
        if self.error:
            raise self.error
        means = images.mean(dim=(1, 2, 3))
        return [
            Detections(mean[None], torch.tensor([0]), torch.tensor([[0.0, 0.0, *reversed(size)]]))
            for mean, size in zip(means, image_sizes, strict=True)
        ]


def finder_batch(*values, first_index=0):
    images = torch.stack([torch.full((3, 2, 2), float(value)) for value in values])
    indices = list(range(first_index, first_index + len(values)))
    return {"img": images, "index": indices, "scale": [0.5] * len(values), "size": [(2, 2)] * len(values)}


@pytest.mark.parametrize("training", [True, False])
def test_detect_returns_original_pixels_and_keeps_the_mode(training):
    model = Finder().train(training)
    found = detect(model, [finder_batch(1, 2)], torch.device("cpu"))
    assert sorted(found) == [0, 1]
    assert found[1].scores.item() == 2 and found[1].boxes.tolist() == [[0, 0, 4, 4]]
    assert model.training == training
    model.error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        detect(model, [finder_batch(1)], torch.device("cpu"))
    assert model.training == training


def test_detect_stops_on_request():
    answers = iter([False, False, True])
    batches = [finder_batch(1, first_index=index) for index in range(5)]
    assert sorted(detect(Finder(), batches, torch.device("cpu"), stop=lambda: next(answers))) == [0, 1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_detect_explains_memory_that_runs_out(error):
    model = Finder()
    model.error = error
    message = r"out of memory with 2 images of 2 x 2 pixels a batch in torch.float32: lower --batch_size"
    with pytest.raises(UserError, match=message):
        detect(model, [finder_batch(1, 2)], torch.device("cpu"))

    def loader():
        yield finder_batch(1)
        raise error

    with pytest.raises(UserError, match=r"out of memory while .* were read: lower --workers"):
        detect(Finder(), loader(), torch.device("cpu"))
