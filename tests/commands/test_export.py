import copy
import json
import sys

import numpy as np
import pytest
import torch
from helpers import gradient, save

from retinanet.commands import export
from retinanet.data.transforms import normalize
from retinanet.errors import UserError
from retinanet.training import checkpoint

NAMES = ["circle", "rectangle", "triangle"]


@pytest.fixture(scope="module")
def model_path(filled_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "net.pt"
    checkpoint.save(path, checkpoint.model_entries(filled_net, NAMES, 64, 96))
    return path


def picture(height, width, seed=0):
    return export.check_picture((height, width), None, seed)


def blank(height, width):
    return torch.full((1, 3, height, width), 128, dtype=torch.uint8)


def assert_near(found, expected):
    """Equal but for rounding: the memory format is another, and so is the order of sums."""
    assert len(found) == len(expected)
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-3 if tensor.dim() == 2 else 1e-5)


@torch.no_grad()
def test_logits_and_boxes_are_those_of_the_network(filled_net):
    images = torch.cat([picture(64, 96), picture(64, 96, 1)])
    logits, boxes = export.Detector(filled_net)(images)
    expected, deltas, anchors = filled_net.heads(normalize(images))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert boxes.shape == deltas.shape
    everything = filled_net.detect(normalize(images), 0.0, 1.0, top_k=None, max_detections=None)
    for found, image_boxes, image_logits in zip(everything, boxes, logits, strict=True):
        best = image_logits.max(dim=1).values.argmax()
        torch.testing.assert_close(found.boxes[0], image_boxes[best], rtol=0, atol=1e-3)
    assert boxes.min() >= 0 and boxes[..., 2].max() <= 96 and boxes[..., 3].max() <= 64
    assert anchors.min() < 0  # so there was something to cut


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (100, 75), (160, 224)])
@pytest.mark.parametrize("max_detections", [100, 5])
def test_detections_are_those_of_the_network(filled_net, size, max_detections):
    images = picture(*size)
    found = export.Detector(filled_net, with_nms=True, max_detections=max_detections)(images)
    expected = filled_net.detect(normalize(images), max_detections=max_detections)[0]
    assert len(expected.scores) >= 5
    assert_near(found, expected)


@torch.no_grad()
def test_the_thresholds_are_honoured(filled_net):
    images = picture(160, 224)
    default = filled_net.detect(normalize(images))[0]
    middle = len(default.scores) // 2
    limits = {"score_threshold": float(default.scores[middle : middle + 2].mean()), "nms_threshold": 0.2}
    found = export.Detector(filled_net, True, **limits)(images)
    expected = filled_net.detect(normalize(images), **limits)[0]
    assert 0 < len(expected.scores) < len(default.scores)
    assert_near(found, expected)


@torch.no_grad()
def test_more_candidates_than_one_level_may_have(filled_net, monkeypatch):
    monkeypatch.setattr(export, "TOP_K", 50)
    images = picture(160, 224)
    found = export.Detector(filled_net, True, score_threshold=0.01)(images)
    expected = filled_net.detect(normalize(images), 0.01, top_k=50)[0]
    assert_near(found, expected)
    assert len(expected.scores) != len(filled_net.detect(normalize(images), 0.01, top_k=None)[0].scores)


def test_pictures_to_compare_with():
    assert torch.equal(picture(40, 50), picture(40, 50)) and not torch.equal(picture(40, 50), picture(40, 50, 1))
    assert picture(40, 50).dtype == torch.uint8 and picture(40, 50).float().std() > 20
    photograph = gradient(48, 64)
    assert torch.equal(export.check_picture((48, 64), photograph, 0)[0].permute(1, 2, 0), torch.from_numpy(photograph))


def test_detections_match_by_class_place_and_score():
    boxes = torch.tensor([[0.0, 0, 100, 100], [50, 50, 150, 150], [0, 0, 10, 10]])
    labels, scores = torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5, 0.05])
    mine = (scores, labels, boxes)
    assert export.unmatched(mine, mine, 0.06) == 0
    assert export.unmatched(mine, (scores, labels, boxes + torch.tensor([0.2, 0, 0.2, 0])), 0.06) == 0
    assert (
        export.unmatched(mine, (scores, labels, boxes + torch.tensor([2.0, 0, 2, 0])), 0.06) == 2
    )  # the third is faint
    assert export.unmatched(mine, (scores, labels.flip(0), boxes), 0.06) == 1
    assert export.unmatched(mine, (scores + 0.01, labels, boxes), 0.0) == 3
    assert export.unmatched(mine, (scores[:0], labels[:0], boxes[:0]), 0.0) == 3
    assert export.unmatched((scores[:0], labels[:0], boxes[:0]), mine, 0.0) == 0


@pytest.mark.parametrize(
    ("with_nms", "change"),
    [
        (False, lambda logits, boxes: [logits * 1.001, boxes]),
        (False, lambda logits, boxes: [logits, boxes + 3]),
        (True, lambda scores, labels, boxes: [scores[1:], labels[1:], boxes[1:]]),
        (True, lambda scores, labels, boxes: [scores, (labels + 1) % 3, boxes]),
    ],
)
def test_a_network_that_differs_is_refused(filled_net, with_nms, change):
    detector, images = export.Detector(filled_net, with_nms), picture(64, 96)
    assert "0 missed, 0 invented" in export.compare(detector, detector, images)
    with pytest.raises(UserError, match="not equal to the original at 64 x 96"):
        export.compare(detector, lambda images: change(*detector(images)), images)


def test_flags_that_contradict_each_other(model_path, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        export.main(["--model", str(model_path), "--dynamic", "--height", "64"])
    assert error.value.code == 2 and "--dynamic takes any size" in capsys.readouterr().err
    assert export.main(["--model", str(model_path), "--output", str(tmp_path / "a.pt")]) == 1
    assert "must end in .onnx" in capsys.readouterr().err
    assert export.main(["--model", str(model_path), "--image", "none.jpg", "--output", str(tmp_path / "a.onnx")]) == 1
    assert "none.jpg: cannot be read as a picture" in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra(model_path, tmp_path, monkeypatch, capsys, filled_net):
    def without_onnx(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(export, "trace", lambda *args: None)
    monkeypatch.setattr(torch.onnx, "export", without_onnx)
    assert export.main(["--model", str(model_path), "--output", str(tmp_path / "a.onnx")]) == 1
    assert "--format onnx needs onnxscript: pip install 'retinanet[onnx]'" in capsys.readouterr().err


def run_export(model_path, path, capsys, *flags):
    """Export, and load again; gives the function, its metadata and what was reported."""
    assert export.main(["--model", str(model_path), "--output", str(path), *flags]) == 0
    out = capsys.readouterr().out
    run, metadata = export.load(path)
    assert json.loads(metadata["class_names"]) == NAMES
    assert metadata["min_side"] == "64" and metadata["max_side"] == "96"
    return run, json.loads(metadata["outputs"]), out


@pytest.mark.slow
def test_torch_export_of_one_size(model_path, tmp_path, capsys, filled_net):
    path, picture_path = tmp_path / "net.pt2", save(gradient(70, 90), tmp_path / "a.png")
    flags = ["--format", "torch_export", "--with_nms", "--image", picture_path]
    run, outputs, report = run_export(model_path, path, capsys, *flags)
    assert outputs == ["scores", "labels", "boxes"]
    assert report.count("64 x 96: ") == 2 and "0 missed, 0 invented" in report
    images = picture(64, 96, 5)
    expected = filled_net.detect(normalize(images))[0]
    for output, tensor in zip(run(images), expected, strict=True):
        torch.testing.assert_close(output, tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "torch_export"])
def test_dynamic_sizes_with_nms(model_path, tmp_path, capsys, filled_net, file_format):
    if file_format == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"net{export.SUFFIXES[file_format]}"
    run, outputs, report = run_export(model_path, path, capsys, "--format", file_format, "--with_nms", "--dynamic")
    assert outputs == ["scores", "labels", "boxes"]
    assert "320 x 448: " in report and "417 x 333: " in report
    for size in ((129, 129), (160, 224), (251, 130)):
        expected = filled_net.detect(normalize(picture(*size)))[0]
        for output, tensor in zip(run(picture(*size)), expected, strict=True):
            torch.testing.assert_close(output, tensor, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "torch_export"])
def test_dynamic_sizes_and_batches_without_nms(model_path, tmp_path, capsys, filled_net, file_format):
    if file_format == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"net{export.SUFFIXES[file_format]}"
    run, outputs, report = run_export(model_path, path, capsys, "--format", file_format, "--dynamic")
    assert outputs == ["logits", "boxes"] and "logits within" in report
    images = torch.cat([picture(150, 201, seed) for seed in range(3)])
    with torch.no_grad():
        logits, boxes = export.Detector(filled_net)(images)
    found = run(images)
    assert (found[0] - logits).abs().max() <= 1e-4 * logits.abs().max()
    torch.testing.assert_close(found[1], boxes, rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "torch_export"])
@pytest.mark.parametrize("bias", [-30.0, None])
def test_nothing_found_and_one_thing_found(tmp_path, filled_net, file_format, bias):
    """Empty and single lists are where graphs break."""
    if file_format == "onnx":
        pytest.importorskip("onnxruntime")
    net, images = copy.deepcopy(filled_net), picture(160, 192)
    if bias is not None:
        net.classificationModel.output.bias.data.fill_(bias)
    threshold = 0.05 if bias is not None else float(net.detect(normalize(images))[0].scores[:2].mean())
    detector = export.Detector(net, True, threshold).eval()
    path = tmp_path / f"net{export.SUFFIXES[file_format]}"
    metadata = {"outputs": json.dumps(["scores", "labels", "boxes"])}
    export.save(export.trace(detector, (320, 448), dynamic=True), path, file_format, metadata)
    scores, labels, boxes = export.load(path)[0](images)
    count = 0 if bias is not None else 1
    assert (scores.shape, labels.shape, boxes.shape) == ((count,), (count,), (count, 4))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a C++ compiler")
def test_aot_inductor(model_path, tmp_path, capsys, filled_net):
    run, outputs, _ = run_export(model_path, tmp_path / "net.aoti.pt2", capsys, "--format", "aot_inductor")
    assert outputs == ["logits", "boxes"]
    images = picture(64, 96, 3)
    with torch.no_grad():
        expected, _ = export.Detector(filled_net)(images)
    np.testing.assert_allclose(run(images)[0], expected, atol=1e-4 * float(expected.abs().max()))
