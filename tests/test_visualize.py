import contextlib
import io
import json
import sys

import numpy as np
import pytest
import tifffile
from helpers import gradient, save, truncate, write_clip, write_coco_data
from PIL import Image

import visualize
from retinanet.commands.detect_files import output_paths
from retinanet.data import images
from retinanet.data.files import find_images
from retinanet.data.video import Video
from retinanet.errors import UserError
from retinanet.training import checkpoint
from retinanet.training.settings import anchors_from_settings
from retinanet.visual import heatmaps
from retinanet.visual.drawing import class_colour

SHAPES = ["--device", "cpu", "--workers", "0", "--dataset", "shapes", "--shapes_val", "3", "--shapes_train", "6"]


@pytest.fixture(scope="module")
def model_path(filled_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    checkpoint.save(path, checkpoint.model_entries(filled_net, ["circle", "rectangle", "triangle"], 96, 160))
    return path


def run(*flags):
    """Exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = visualize.main([str(flag) for flag in flags])
    return status, out.getvalue(), err.getvalue()


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_truth_shows_the_boxes_in_the_colours_of_their_classes(tmp_path):
    status, _, err = run(*SHAPES, "--show", "truth", "--indices", 2, 0, "--min_side", 96, "--out_dir", tmp_path)
    assert (status, err) == (0, "")
    assert names(tmp_path) == {"truth_00000.png", "truth_00002.png"}
    dataset = visualize.flags.make_dataset(visualize.parse_arguments([*SHAPES, "--show", "truth"]), "val", None)
    picture = read(tmp_path / "truth_00002.png")
    bar = picture.shape[0] - 4 * 96  # enlarged four times, under a title
    for x1, _, x2, y2, label in dataset.load_annotations(2):
        assert tuple(picture[bar + int(4 * y2) - 1, int(2 * (x1 + x2))]) == class_colour(int(label))


def test_augmented_truth_is_that_of_the_seed(tmp_path):
    write_coco_data(tmp_path)
    pictures = []
    for number, flags in enumerate(
        [[], ["--augment"], ["--augment"], ["--augment", "--seed", 1], ["--augment", "--seed", 2]]
    ):
        common = ["--dataset", "coco", "--coco_path", tmp_path, "--show", "truth", "--min_side", 64]
        status, _, err = run(*common, *flags, "--out_dir", tmp_path / str(number))
        assert (status, err) == (0, "")
        pictures.append(np.concatenate([read(path).ravel() for path in sorted((tmp_path / str(number)).iterdir())]))
    np.testing.assert_array_equal(pictures[1], pictures[2])
    assert any(not np.array_equal(pictures[0], picture) for picture in pictures[1:])  # some seed mirrors


def test_anchors_and_matches_take_the_anchors_of_the_flags(tmp_path):
    flags = [*SHAPES, "--indices", 1, "--min_side", 96, "--out_dir", tmp_path]
    for show in ("anchors", "matches"):
        assert run(*flags, "--show", show)[0] == 0
    first = read(tmp_path / "matches_00001.png")
    scales = ["--anchor_scales", 0.25, "--anchor_ratios", 1]
    assert run(*flags, "--show", "matches", *scales)[0] == 0
    assert not np.array_equal(first, read(tmp_path / "matches_00001.png"))
    status, _, err = run(*flags, "--show", "matches", "--anchor_sizes", 32, 64)
    assert status == 1 and "--anchor_sizes" in err and "one entry for each" in err


@pytest.mark.slow
def test_pyramid_and_loss(model_path, tmp_path):
    pytest.importorskip("matplotlib")
    for show in ("pyramid", "loss"):
        status, _, err = run(*SHAPES, "--show", show, "--model", model_path, "--limit", 2, "--out_dir", tmp_path)
        assert (status, err) == (0, "")
    pairs = {f"{show}_0000{index}.png" for show in ("pyramid", "loss") for index in (0, 1)}
    assert names(tmp_path) == pairs | {"focal_loss.png"}


def test_the_loss_is_that_of_the_matching_rule_of_the_flags(model_path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(heatmaps, "draw_cumulative_loss", lambda results, *_: seen.append(results[0].labels))
    flags = [*SHAPES, "--show", "loss", "--model", model_path, "--limit", 1, "--min_side", 32, "--out_dir", tmp_path]
    for rule in ([], ["--best_match_iou", 0.01]):
        assert run(*flags, *rule)[0] == 0
    # Shapes of 8 to 16 pixels: no anchor of 32 reaches one, but each has a best one.
    assert not (seen[0] >= 0).any() and (seen[1] >= 0).any()


def test_detections_are_single_files_and_a_sheet(model_path, tmp_path):
    flags = ["--score_threshold", 0.1, "--max_detections", 5, "--limit", 2]
    status, _, err = run(*SHAPES, "--model", model_path, *flags, "--out_dir", tmp_path)
    assert (status, err) == (0, "")
    assert names(tmp_path) == {"detections_00000.png", "detections_00001.png", "detections.png"}


def test_the_best_scores_are_the_default_where_there_are_any(filled_net, tmp_path):
    save(gradient(64, 90), tmp_path / "a.png")
    for name, best in {"with": {"all": 0.05, "classes": {"circle": 0.9}}, "without": {}}.items():
        path, classes = tmp_path / f"{name}.pt", ["circle", "rectangle", "triangle"]
        checkpoint.save(path, checkpoint.model_entries(filled_net, classes, 96, 160, score_thresholds=best))
        flags = ["--device", "cpu", "--images", tmp_path / "a.png", "--model", path, "--out_dir", tmp_path / name]
        assert run(*flags)[0] == 0
        content = json.loads((tmp_path / name / "detections.json").read_text())
        scores = {(found["class"], found["score"] > 0.05) for found in content["images"][0]["detections"]}
        assert content["score_threshold"] == (0.05 if best else 0.5)
        assert scores == ({("triangle", True)} if best else set())
        status, _, err = run(*flags, "--score_threshold", "best")
        assert (status, "holds no scores of the best F1" in err) == ((0, False) if best else (1, True))


def test_anchor_fit_reports_and_advises(tmp_path):
    pytest.importorskip("matplotlib")
    status, out, err = run(*SHAPES, "--show", "anchor_fit", "--min_side", 32, "--out_dir", tmp_path)
    assert (status, err) == (0, "")
    assert names(tmp_path) == {"anchor_fit.json", "anchor_fit.png"}
    content = json.loads((tmp_path / "anchor_fit.json").read_text())
    # Shapes of 24 to 48 of 96 pixels are 8 to 16 of 32: none is reached by an anchor of 32.
    assert len(content["unreachable"]) == content["coverage"]["all"]["all"]["boxes"] > 0
    assert "boxes can never be learned" in out and f"use {content['advised']['flags']}" in out
    args = visualize.parse_arguments([*SHAPES, "--show", "anchor_fit", *content["advised"]["flags"].split()])
    anchors = anchors_from_settings(args)
    fit = visualize.anchor_fit.measure(visualize.flags.make_dataset(args, "train", None), anchors, 32, 1024)
    assert fit.coverage(0.5) == pytest.approx(content["coverage"]["all"]["all"]["iou_0.5_advised"])
    assert fit.coverage(0.5) > 0.2


@pytest.fixture
def pictures(tmp_path):
    """A folder of frames, two files that are no pictures, and a hidden file."""
    folder = tmp_path / "frames"
    (folder / "sub").mkdir(parents=True)
    for name in ("frame10.png", "frame2.jpg", "frame1.png", "sub/frame1.png"):
        save(gradient(40, 60), folder / name)
    (folder / "note.txt").write_text("no picture")
    (folder / "scan.pdf").write_text("Pillow knows the kind, but nothing here reads it")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def test_a_folder_is_its_pictures_in_the_order_of_their_numbers(pictures):
    save(gradient(8, 8), pictures / "frame3.mpo")
    files = find_images([str(pictures)])
    assert [path.name for path in files] == ["frame1.png", "frame2.jpg", "frame3.mpo", "frame10.png"]
    files = find_images([f"{pictures}/**/*.png", str(pictures / "frame2.jpg"), f"{pictures}/frame1*"])
    assert [str(path.relative_to(pictures)) for path in files] == [
        "frame1.png", "frame10.png", "sub/frame1.png", "frame2.jpg"
    ]  # fmt: skip
    for nothing in ("nowhere.jpg", f"{pictures}/*.gif"):
        with pytest.raises(UserError, match="no such images exist"):
            find_images([nothing])


def test_outputs_have_unique_names_and_spare_the_inputs(pictures, tmp_path):
    save(gradient(8, 8), pictures / "frame2.png")
    files = find_images([f"{pictures}/**/*"])
    files = [path for path in files if path.suffix not in (".txt", ".pdf")]
    out = tmp_path / "out"
    targets = output_paths(files, out)
    assert len(set(targets)) == len(files) == 5
    assert {str(path.relative_to(out)) for path in targets} == {
        "frame1.png", "frame2.png", "frame2_2.png", "frame10.png", "sub/frame1.png"
    }  # fmt: skip
    with pytest.raises(UserError, match="would be mixed with inputs"):
        output_paths(files, pictures)


def test_images_become_pictures_and_one_json(model_path, pictures, tmp_path):
    out = tmp_path / "out"
    limits = ["--score_threshold", 0.01, "--max_detections", 3]
    flags = ["--device", "cpu", "--model", model_path, *limits, "--out_dir", out]
    status, text, err = run("--images", pictures, *flags)
    assert (status, err) == (0, "") and "3 images" in text
    assert names(out) == {"frame1.png", "frame2.png", "frame10.png", "detections.json"}
    content = json.loads((out / "detections.json").read_text())
    assert [entry["file"].rsplit("/")[-1] for entry in content["images"]] == ["frame1.png", "frame2.jpg", "frame10.png"]
    entry = content["images"][0]
    assert (entry["height"], entry["width"]) == (40, 60) and 0 < len(entry["detections"]) <= 3
    for found in entry["detections"]:
        assert content["class_names"][found["label"]] == found["class"] and 0.01 < found["score"] <= 1
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 < x2 <= 60 and 0 <= y1 < y2 <= 40
    # The picture shows the box where the file says that it is.
    picture = read(out / "frame1.png")
    zoom = picture.shape[0] // 40
    best = entry["detections"][0]
    x1, _, x2, y2 = (round(zoom * value) for value in best["box"])
    colours = {tuple(class_colour(found["label"])) for found in entry["detections"]} | {(0, 0, 0)}
    line = {tuple(pixel) for pixel in picture[y2 - 1, x1:x2].tolist()}
    assert line & colours == line


def test_unreadable_images_are_listed_at_the_end(model_path, pictures, tmp_path):
    truncate(pictures / "frame2.jpg")
    (pictures / "frame10.png").write_text("no picture")
    flags = ["--device", "cpu", "--model", model_path, "--out_dir", tmp_path / "out"]
    status, text, err = run("--images", pictures, *flags)
    assert status == 1 and "1 image" in text
    assert "2 of 3 files skipped" in err and "frame2.jpg" in err and "frame10.png" in err
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(content["images"]) == 1 and len(content["unreadable"]) == 2


def test_of_large_images_with_a_damaged_part_the_others_are_drawn(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGE", 1000)  # so that these count as large ones, of which parts are read
    folder = tmp_path / "large"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
        tifffile.imwrite(folder / f"{name}.tif", noise, compression="zlib", rowsperstrip=16, photometric="rgb")
    for name in ("a", "c", "d"):
        with tifffile.TiffFile(folder / f"{name}.tif") as file:
            start = file.pages[0].dataoffsets[7]
        with open(folder / f"{name}.tif", "r+b") as file:
            file.seek(start)
            file.write(bytes(100))
    flags = ["--device", "cpu", "--model", model_path, "--tile", 96, "--out_dir", tmp_path / "out"]
    status, text, err = run("--images", folder, *flags)
    assert status == 1 and "1 image" in text and "3 of 4 files skipped" in err
    assert all(f"{name}.tif" in err for name in "acd") and "Traceback" not in err
    assert names(tmp_path / "out") == {"b.png", "detections.json"}


def test_videos_and_images_of_a_folder_are_drawn_together(model_path, pictures, tmp_path):
    pytest.importorskip("av", reason="NO TEST OF VIDEOS: pip install av")
    write_clip(pictures / "clip2.mkv", range(0, 50, 10), size=(41, 61), codec="ffv1")
    write_clip(pictures / "clip10.mp4", range(4), size=(64, 48))
    (pictures / "frame3.mp4").write_text("no video")
    out = tmp_path / "out"
    flags = ["--device", "cpu", "--model", model_path, "--score_threshold", 0.05, "--every", 2, "--out_dir", out]
    status, text, err = run("--images", pictures, *flags)
    assert status == 1 and "1 of 6 files skipped" in err and "frame3.mp4: cannot be read as a video" in err
    assert "3 images, 2 videos, 5 frames" in text
    assert names(out) == {"clip2.mp4", "clip10.mp4", "frame1.png", "frame2.png", "frame10.png", "detections.json"}
    content = json.loads((out / "detections.json").read_text())
    entries = [(entry["file"].rsplit("/")[-1], entry.get("frame"), entry.get("seconds")) for entry in content["images"]]
    assert entries[:5] == [
        ("clip2.mkv", 0, 0), ("clip2.mkv", 2, 0.8), ("clip2.mkv", 4, 1.6), ("clip10.mp4", 0, 0), ("clip10.mp4", 2, 0.08)
    ]  # fmt: skip
    assert len(content["unreadable"]) == 1
    for name, times, source in (("clip2", [0, 0.8, 1.6], "clip2.mkv"), ("clip10", [0, 0.08], "clip10.mp4")):
        frames, plain = list(Video(out / f"{name}.mp4")), list(Video(pictures / source, 2))
        assert [float(frame.seconds) for frame in frames] == pytest.approx(times, abs=1e-3)
        entry = next(entry for entry in content["images"] if entry["file"].endswith(source))
        zoom = frames[0].image.shape[0] // entry["height"]
        assert zoom > 1 and entry["detections"] and all(side % 2 == 0 for side in frames[0].image.shape[:2])
        # Lines differ from the frame where the boxes are, and at most there and at captions.
        height, width = zoom * entry["height"], zoom * entry["width"]
        difference = np.abs(
            frames[0].image[:height, :width].astype(int) - plain[0].image.repeat(zoom, 0).repeat(zoom, 1)
        )
        _, _, x2, y2 = (round(zoom * value) for value in entry["detections"][0]["box"])
        assert difference[max(0, y2 - 3) : y2, max(0, x2 - 3) : x2].max() > 40


def test_without_pyav_images_are_drawn_and_videos_are_named(model_path, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (pictures / "clip.mp4").write_text("no video")
    flags = ["--device", "cpu", "--model", model_path, "--out_dir", tmp_path / "out"]
    status, text, err = run("--images", pictures, *flags)
    assert status == 1 and "3 images, " in text
    assert "1 of 4 files skipped" in err and "clip.mp4: videos need PyAV: pip install av" in err


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        ([], ["--dataset or --images"]),
        (["--dataset", "shapes", "--every", "2"], ["--every is for videos"]),
        (["--images", "a.mp4", "--model", "x", "--every", "2000000"], ["--every must be from 1 to 1,000,000"]),
        (["--dataset", "shapes", "--images", "x"], ["--dataset or --images"]),
        (["--dataset", "shapes", "--show", "loss"], ["--show loss needs --model"]),
        (["--images", "x"], ["--images needs --model"]),
        (["--dataset", "csv", "--show", "anchor_fit"], ["--csv_train"]),
        (["--dataset", "csv", "--show", "truth"], ["--csv_val"]),
        (["--dataset", "shapes", "--model", "x", "--anchor_ratios", "1"], ["--model brings its own anchors"]),
        (["--dataset", "shapes", "--model", "x", "--augment"], ["takes no --augment"]),
        (["--dataset", "shapes", "--show", "truth", "--random_crop", "0.5"], ["need --augment"]),
        (["--dataset", "shapes", "--show", "truth", "--seed", "-1"], ["--seed", "at least 0"]),
    ],
)
def test_contradictions_are_usage_errors(flags, reported):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as status:
        visualize.main(flags)
    assert status.value.code == 2
    for text in reported:
        assert text in err.getvalue()


def test_an_index_that_does_not_exist_is_named(tmp_path):
    status, _, err = run(*SHAPES, "--show", "truth", "--indices", 3, "--out_dir", tmp_path)
    assert status == 1 and "--indices 3" in err and "3 images" in err
