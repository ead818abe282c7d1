"""A detector of 12-bit images: one pixel range from training to `predict`."""

import numpy as np
import pytest
import tifffile
import torch
from helpers import write_csv_data

import retinanet
import train
import validate
import visualize
from retinanet.commands import check
from retinanet.data.images import read_image
from retinanet.data.pixels import checked_range
from retinanet.inference import as_array
from retinanet.training import checkpoint

QUICK = [
    *("--depth", "18", "--weights", "none", "--recipe", "scratch", "--epochs", "1", "--batch_size", "2"),
    *("--min_side", "32", "--max_side", "64", "--device", "cpu", "--precision", "fp32", "--workers", "0"),
]


pytestmark = pytest.mark.usefixtures("small_training")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """CSV files of four images whose brightest pixels differ, and their flags."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for index in range(4):
        tifffile.imwrite(folder / f"{index}.tif", random.integers(100, 2000 + 500 * index, (48, 64), dtype=np.uint16))
    boxes, classes = write_csv_data(folder, [f"{index}.tif,1,1,30,30,circle" for index in range(4)])
    return folder, f"--dataset csv --csv_val {boxes} --csv_classes {classes}".split(), ["--csv_train", str(boxes)]


@pytest.mark.parametrize(
    ("flags", "expected"), [("", None), pytest.param("--pixel_range 0 4095", (0, 4095), marks=pytest.mark.slow)]
)
def test_the_range_of_training_is_that_of_the_model(data, tmp_path, flags, expected, capfd):
    folder, val_flags, train_flags = data
    assert train.main([*val_flags, *train_flags, *QUICK, "--out_dir", str(tmp_path), *flags.split()]) == 0
    net, info = checkpoint.load_model(tmp_path / "last.pt")
    ranges = info["pixel_range"]
    low, high = ranges["uint16"] if expected is None else ranges
    assert (low, high) == expected if expected else (100 <= low < 110 and 3000 < high < 3500)
    path = folder / "0.tif"  # 2000 at most: its own range would be another
    pixels = as_array(tifffile.imread(path), (low, high))
    np.testing.assert_array_equal(pixels, read_image(path, (low, high)))
    assert (pixels != read_image(path)).any()
    grey = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)  # of a type that the model has not seen
    assert expected or as_array(grey, ranges).max() == 255
    limits = {"score_threshold": 0, "max_detections": 10}
    found = [retinanet.predict((net, info), image, **limits)[0] for image in (str(path), tifffile.imread(path), pixels)]
    assert len(found[0].scores) and all(torch.equal(one.scores, found[0].scores) for one in found)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = retinanet.data.images.read_image
        patch.setattr(retinanet.data.dataset, "read_image", lambda *args: seen.append(args[1]) or original(*args))
        model = ["--model", str(tmp_path / "last.pt"), "--device", "cpu", "--workers", "0"]
        assert validate.main([*val_flags, *model]) == 0
        assert visualize.main([*val_flags, *model, "--out_dir", str(tmp_path / "seen"), "--limit", "1"]) == 0
        assert len(seen) > 4 and all(one == ranges for one in seen)
        if expected:
            assert validate.main([*val_flags, *model, "--pixel_range", "-5", "9000"]) == 0
            assert seen[-1] == (-5, 9000)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_range(data, tmp_path, monkeypatch):
    _, val_flags, train_flags = data
    flags = [*val_flags, *train_flags, *QUICK, "--out_dir", str(tmp_path)]
    assert train.main(flags) == 0
    content = checkpoint.load(tmp_path / "last.pt")
    content["pixel_range"] = {"uint16": (0.0, 5000.0)}  # as if the files had been others
    content["training"]["progress"] |= {"epoch": 0, "step": 1}
    monkeypatch.setattr(retinanet.running, "check_resume", lambda *_: None)
    monkeypatch.setattr(retinanet.training.run, "check_state", lambda *_: None)
    checkpoint.save(tmp_path / "last.pt", content)
    assert train.main([*flags, "--resume", "auto"]) == 0
    assert checkpoint.load(tmp_path / "last.pt")["pixel_range"] == {"uint16": (0, 5000)}


def test_check_shows_the_range_and_what_is_above_the_limit(data, capfd):
    _, val_flags, train_flags = data
    assert check.main([*val_flags, *train_flags, "--workers", "0"]) == 0
    assert "pixels of uint16: 10" in "".join(capfd.readouterr())
    assert check.main([*val_flags, *train_flags, "--workers", "0", "--pixel_limit", "0.003"]) == 1
    assert "0.tif: has 64 x 48 pixels, more than the limit of 0.003 million; --pixel_limit 1 " in "".join(
        capfd.readouterr()
    )


@pytest.mark.parametrize("values", ["5", "5 4", "1 2 3", "auto 3", "nan 4", "0 inf", "x y"])
def test_a_wrong_range_is_a_usage_error(data, values, capfd):
    with pytest.raises(SystemExit) as error:
        train.main([*data[1], *data[2], "--pixel_range", *values.split()])
    assert error.value.code == 2 and "must be auto or two numbers" in capfd.readouterr().err
    with pytest.raises(ValueError, match="pixel range must be two numbers"):
        checked_range(values.split())
