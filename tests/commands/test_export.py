import copy
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import gradient, save

from retinanet.commands import export
from retinanet.data.transforms import normalize
from retinanet.errors import UserError
from retinanet.inference import predict
from retinanet.postprocess import Detections
from retinanet.training import checkpoint

NAMES = ["circle", "rectangle", "triangle"]


@pytest.fixture(scope="module")
def model_path(filled_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "net.pt"
    checkpoint.save(path, checkpoint.model_entries(filled_net, NAMES, 64, 96))
    return path


@pytest.fixture
def loaded(filled_net, tmp_path, monkeypatch):
    """The path of a model that is loaded already."""
    info = {"class_names": NAMES, "min_side": 64, "max_side": 96, "tile": None, "tile_overlap": 0.25}
    monkeypatch.setattr(export, "load_model", lambda path: (filled_net, info | {"pixel_range": None}))
    return tmp_path / "net.pt"


def random_image(height, width, seed=0):
    return export.check_image((height, width), None, seed)


def assert_near(found, expected):
    """Equal up to rounding: the memory format differs, and with it the order of sums."""
    assert len(found) == len(expected)
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-3 if tensor.dim() == 2 else 1e-5)


@torch.no_grad()
def test_logits_and_boxes_are_those_of_the_network(filled_net):
    images = torch.cat([random_image(64, 96), random_image(64, 96, 1)])
    logits, boxes = export.Detector(filled_net)(images)
    expected, deltas, anchors = filled_net.heads(normalize(images))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert boxes.shape == deltas.shape
    everything = filled_net.detect(normalize(images), 0.0, 1.0, top_k=None, max_detections=None)
    for found, image_boxes, image_logits in zip(everything, boxes, logits, strict=True):
        best = image_logits.max(dim=1).values.argmax()
        torch.testing.assert_close(found.boxes[0], image_boxes[best], rtol=0, atol=1e-3)
    assert boxes.min() >= 0 and boxes[..., 2].max() <= 96 and boxes[..., 3].max() <= 64
    assert anchors.min() < 0  # so there was something to clip


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (100, 75), (130, 160)])
def test_detections_are_those_of_the_network(filled_net, size):
    images, number = random_image(*size), 5 if size == (64, 96) else 100
    expected = filled_net.detect(normalize(images))[0]
    assert len(expected.scores) > 5
    found = export.Detector(filled_net, with_nms=True, max_detections=number)(images)
    assert_near(found, [values[:number] for values in expected])


@torch.no_grad()
def test_the_thresholds_are_honoured(filled_net):
    images = random_image(96, 128)
    default = filled_net.detect(normalize(images))[0]
    middle = len(default.scores) // 2
    limits = {"score_threshold": float(default.scores[middle : middle + 2].mean()), "nms_threshold": 0.2}
    found = export.Detector(filled_net, True, **limits)(images)
    expected = filled_net.detect(normalize(images), **limits)[0]
    assert 0 < len(expected.scores) < len(default.scores)
    assert_near(found, expected)


@torch.no_grad()
def test_more_candidates_than_one_level_may_have(filled_net):
    images = random_image(96, 128)
    found = export.Detector(filled_net, True, score_threshold=0.01, top_k=50)(images)
    expected = filled_net.detect(normalize(images), 0.01, top_k=50)[0]
    assert_near(found, expected)
    assert len(expected.scores) != len(filled_net.detect(normalize(images), 0.01, top_k=None)[0].scores)


def test_images_to_compare_with():
    image = random_image(40, 50)
    assert torch.equal(image, random_image(40, 50)) and not torch.equal(image, random_image(40, 50, 1))
    assert image.dtype == torch.uint8 and image.float().std() > 20
    photograph = gradient(48, 64)
    assert torch.equal(export.check_image((48, 64), photograph, 0)[0].permute(1, 2, 0), torch.from_numpy(photograph))


def detections(*rows):
    """Rows of score, label, x1, y1, x2, y2."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, 0], table[:, 1].long(), table[:, 2:])


A, NEAR_A, B = [0, 0, 100, 100], [30, 0, 130, 100], [200, 200, 300, 300]  # IoU of A and NEAR_A: 0.54


def test_any_right_result_of_nms_is_accepted():
    candidates = detections([0.00002, 0, *A], [0.00001, 0, *NEAR_A], [0.00001, 1, *A])
    for found in (
        detections([0.00002, 0, *A], [0.00001, 1, *A]),
        detections([0.00001, 1, *A], [0.00001, 0, *NEAR_A]),  # the two nearly equal ones in the other order
        detections([0.00003, 0, 0.05, 0, 100, 100], [0.00001, 1, *A]),
    ):
        assert export.count_missing(found, candidates, 0.5, 100) == 0
        assert export.count_wrong(found, candidates, 0.5) == 0


@pytest.mark.parametrize(
    ("found", "missing", "wrong"),
    [
        ([], 3, 0),
        ([[0.9, 0, *A]], 1, 0),
        ([[0.9, 0, *A], [0.7, 0, *NEAR_A], [0.6, 1, *B]], 0, 1),  # suppressed by A
        ([[0.7, 0, *NEAR_A], [0.6, 1, *B]], 1, 0),  # the worse one is kept
        ([[0.9, 0, *A], [0.6, 2, *B]], 1, 1),
        ([[0.9, 0, 2, 0, 102, 100], [0.6, 1, *B]], 0, 1),
        ([[0.9, 0, *A], [0.59, 1, *B]], 1, 1),
    ],
)
def test_wrong_results_of_nms_are_counted(found, missing, wrong):
    candidates = detections([0.9, 0, *A], [0.7, 0, *NEAR_A], [0.6, 1, *B])
    found = detections(*found)
    assert export.count_missing(found, candidates, 0.5, 100) == missing
    assert export.count_wrong(found, candidates, 0.5) == wrong


def test_candidates_beyond_a_full_list_are_not_missing():
    candidates = detections([0.9, 0, *A], [0.6, 1, *B])
    assert export.count_missing(detections([0.9, 0, *A]), candidates, 0.5, 1) == 0
    assert export.count_missing(detections([0.6, 1, *B]), candidates, 0.5, 1) == 1


@torch.no_grad()
def test_scores_near_zero_compare_equal(filled_net):
    net = copy.deepcopy(filled_net)
    net.classificationModel.output.weight.mul_(1e-3)  # all scores are nearly equal
    detector, images = export.Detector(net, True, score_threshold=0.0), random_image(64, 96)
    noise = torch.randn_like(detector.net.heads(normalize(images))[0]) * 1e-5

    def rounded(images):
        logits, boxes = export.Detector(net)(images)
        return detector.select((logits + noise)[0], boxes[0], 64, 96)

    eager = detector(images)
    assert not torch.equal(rounded(images)[2], eager[2])
    assert "100 detections, 0 missing, 0 wrong" in export.compare(detector, rounded, images)


@torch.no_grad()
@pytest.mark.parametrize(
    ("with_nms", "changes"),
    [
        (False, [lambda logits, boxes: (logits * 1.001, boxes), lambda logits, boxes: (logits, boxes + 3)]),
        (
            True,
            [
                lambda scores, labels, boxes: (scores[1:], labels[1:], boxes[1:]),
                lambda scores, labels, boxes: (scores, (labels + 1) % 3, boxes),
            ],
        ),
    ],
)
def test_a_network_that_differs_is_refused(filled_net, with_nms, changes):
    detector, images = export.Detector(filled_net, with_nms), random_image(64, 96)
    outputs = detector(images)
    assert "0 missing, 0 wrong" in export.compare(detector, lambda _: outputs, images)
    for change in changes:
        with pytest.raises(UserError, match="differs from the original at 64 x 96"):
            export.compare(detector, lambda _, change=change: change(*outputs), images)


def test_flags_that_contradict_each_other(loaded, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        export.main(["--model", str(loaded), "--dynamic", "--height", "64"])
    assert error.value.code == 2 and "--dynamic takes images of any size" in capsys.readouterr().err
    assert export.main(["--model", str(loaded), "--output", str(tmp_path / "a.pt")]) == 1
    assert "must end in .onnx" in capsys.readouterr().err
    assert export.main(["--model", str(loaded), "--image", "none.jpg", "--output", str(tmp_path / "a.onnx")]) == 1
    assert "none.jpg: cannot be read as an image" in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra(loaded, tmp_path, monkeypatch, capsys):
    def without_onnx(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(export, "trace", lambda *args: None)
    monkeypatch.setattr(torch.onnx, "export", without_onnx)
    assert export.main(["--model", str(loaded), "--output", str(tmp_path / "a.onnx")]) == 1
    assert "--format onnx needs onnxscript: pip install 'retinanet[onnx]'" in capsys.readouterr().err


def run_export(model_path, path, capsys, *flags):
    """Export, and load again; returns the function, its metadata and the report."""
    assert export.main(["--model", str(model_path), "--output", str(path), *flags]) == 0
    out = capsys.readouterr().out
    run, metadata = export.load(path)
    assert json.loads(metadata["class_names"]) == NAMES
    assert metadata["min_side"] == "64" and metadata["max_side"] == "96"
    assert (metadata["tile"], metadata["tile_overlap"]) == ("null", "0.25")
    return run, json.loads(metadata["outputs"]), out


@pytest.mark.parametrize("name", ["missing/a.onnx", "file/a.onnx", "folder.onnx", "link.onnx", "fifo.onnx"])
def test_where_nothing_can_be_written(loaded, tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "fifo.onnx")
    assert export.main(["--model", str(loaded), "--output", str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert ("nothing can be written to its folder" if "/" in name else "is not a regular file") in error
    assert error.count("\n") == 1 and name in error and not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(1),))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"net\.pt2: cannot be saved \(.*No space left"):
        export.save(program, tmp_path / "net.pt2", "torch_export", {})
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    export.save(program, tmp_path / "net.pt2", "torch_export", {"a": "b"})
    assert export.load(tmp_path / "net.pt2")[1] == {"a": "b"}


@pytest.mark.slow
def test_torch_export_of_one_size(model_path, tmp_path, capsys, filled_net):
    path, image_path = tmp_path / "net.pt2", save(gradient(70, 90), tmp_path / "a.png")
    flags = ["--format", "torch_export", "--with_nms", "--image", image_path]
    run, outputs, report = run_export(model_path, path, capsys, *flags)
    assert outputs == ["scores", "labels", "boxes"]
    assert report.count("64 x 96: ") == 2 and "0 missing, 0 wrong" in report
    images = random_image(64, 96, 5)
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
        expected = filled_net.detect(normalize(random_image(*size)))[0]
        for output, tensor in zip(run(random_image(*size)), expected, strict=True):
            torch.testing.assert_close(output, tensor, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "torch_export"])
def test_dynamic_sizes_and_batches_without_nms(model_path, tmp_path, capsys, filled_net, file_format):
    if file_format == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"net{export.SUFFIXES[file_format]}"
    run, outputs, report = run_export(model_path, path, capsys, "--format", file_format, "--dynamic")
    assert outputs == ["logits", "boxes"] and "logits within" in report
    images = torch.cat([random_image(150, 201, seed) for seed in range(3)])
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
    net, images = copy.deepcopy(filled_net), random_image(160, 192)
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
    images = random_image(64, 96, 3)
    with torch.no_grad():
        expected, _ = export.Detector(filled_net)(images)
    np.testing.assert_allclose(run(images)[0], expected, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_the_readme_shows_how_to_prepare_images_for_the_network(filled_net, tmp_path, monkeypatch):
    """Its code, with our network in place of the exported one, finds what `predict` finds."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "onnxruntime" in block]

    class Session:
        def __init__(self, path):
            assert path == "best.onnx"

        def get_modelmeta(self):
            return SimpleNamespace(custom_metadata_map={"min_side": "64", "max_side": "96"})

        def run(self, outputs, inputs):
            images = torch.from_numpy(inputs["images"])
            return [values.numpy() for values in export.Detector(filled_net, with_nms=True)(images)]

    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    monkeypatch.chdir(tmp_path)
    save(gradient(128, 192), "a.jpg")
    found = {}
    exec(code, found)
    limits = {"score_threshold": 0.05, "min_side": 64, "max_side": 96}
    expected = predict(filled_net, "a.jpg", **limits)[0]
    np.testing.assert_allclose(found["scores"], expected.scores, rtol=1e-4)
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=0.01)
