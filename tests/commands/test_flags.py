import argparse

import numpy as np
import pytest
from helpers import gradient, write_coco_data, write_csv_data

import train
import validate
import visualize
from retinanet.commands import export, flags
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.errors import UserError
from retinanet.training.checkpoint import LIMITS
from retinanet.training.files import make_out_dir
from retinanet.training.settings import anchors_from_settings, training_transform

ARABIC = "\N{ARABIC-INDIC DIGIT FIVE}"


def parse(*argv, training=True):
    parser = flags.make_parser("test")
    flags.add_data_arguments(parser, training)
    flags.add_machine_arguments(parser)
    flags.add_detection_arguments(parser, of_model=not training)
    parser.add_argument("--batch_size", type=flags.positive_int, default=4, help=f"images per batch {flags.DEFAULT}")
    flags.add_augmentation_arguments(parser)
    flags.add_anchor_arguments(parser)
    if training:
        parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(list(argv))


def identity(sample):
    return sample


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (
            flags.positive_int,
            {"1": 1, "12": 12, "1e3": 1000},
            ["0", "-3", "+5", "1_000", ARABIC, " 5", "1.5", "many", "nan", "inf", str(2**63)],
        ),
        (flags.non_negative_int, {"0": 0, "12": 12}, ["-1", "0.5", "", "9" * 5000]),
        (flags.positive_float, {"0.5": 0.5, "1e-5": 1e-5}, ["0", "-1", "nan", "inf", "fast", "1_0.5", "+0.5", ARABIC]),
        (flags.fraction, {"0": 0, "0.05": 0.05, "1": 1}, ["-0.1", "1.01", "nan", "half"]),
    ],
)
def test_number_types(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):  # argparse turns both into usage errors
            kind(text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "shapes", "--batch_size", "0"], "--batch_size: must be at least 1"),
        (["--dataset", "shapes", "--workers", "x"], "--workers: invalid whole number value: 'x'"),
        (["--dataset", "shapes", "--score_threshold", "2"], "--score_threshold: must be from 0 to 1, not 2"),
        (["--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
        (["--dataset", "shapes", "--shapes_v", "3"], "unrecognized arguments: --shapes_v"),  # no abbreviations
        ([], "required: --dataset"),
    ],
)
def test_wrong_flags_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as status:
        parse(*argv)
    assert status.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("program", "flag"), [(train, "--out_dir"), (validate, "--out"), (export, "--output")])
def test_an_empty_output_is_a_usage_error(program, flag, capsys):
    needed = ["--model", "a.pt"] if program is not train else []
    needed += ["--dataset", "shapes"] if program is not export else []
    with pytest.raises(SystemExit) as status:
        program.parse_arguments([*needed, flag, ""])
    assert status.value.code == 2 and f"{flag} is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "numbers", "bound"),
    [
        ("batch_size", ["4611686018427387904"], "from 1 to 65,536"),
        ("workers", ["100000"], "from 0 to 256"),
        ("shapes_val", ["1e9"], "from 1 to 1,000,000"),
        ("shapes_train", ["1000000000"], "from 1 to 1,000,000"),
        ("max_detections", ["1000000000"], "from 1 to 1,000,000"),
        ("top_k", ["1e7"], "from 1 to 1,000,000"),
        ("jitter", ["600", "1000000000"], "from 1 to 16,384"),
        ("anchor_sizes", ["32", "64", "128", "256", "1e300"], "from 0.5 to 16,384"),
        ("anchor_scales", ["1e-300"], "from 0.01 to 100"),
        ("anchor_ratios", ["1", "1e300"], "from 0.01 to 100"),
    ],
)
def test_absurd_numbers_are_usage_errors_with_the_bound(capsys, flag, numbers, bound):
    with pytest.raises(SystemExit) as status:
        parse("--dataset", "shapes", f"--{flag}", *numbers)
    assert status.value.code == 2 and f"error: --{flag} must be {bound}, not " in capsys.readouterr().err


def test_all_numbers_out_of_bounds_are_reported_together(capsys):
    with pytest.raises(SystemExit):
        parse("--dataset", "shapes", "--workers", "257", "--batch_size", "70000", "--shapes_val", "1000000")
    error = capsys.readouterr().err
    assert (
        "--batch_size must be" in error and "--workers must be" in error and "--shapes_val" not in error.split(":")[-1]
    )


def test_help_shows_defaults_where_there_are_any(capsys):
    with pytest.raises(SystemExit) as status:
        parse("--help")
    assert status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "images per batch (default: 4)" in text and "(default: val2017)" in text
    assert "None" not in text and "False" not in text


def test_limits_of_detection_have_the_same_names_and_defaults_everywhere(capsys):
    parsed = parse("--dataset", "shapes")
    assert flags.given_limits(parsed) == LIMITS
    assert LIMITS == {"score_threshold": 0.05, "nms_threshold": 0.5, "top_k": 1000, "max_detections": 100}
    given = parse("--dataset", "shapes", "--max_detections", "7", "--score_threshold", "0", training=False)
    assert flags.given_limits(given) == {"max_detections": 7, "score_threshold": 0.0}  # the others are the model's
    for main in (train.main, validate.main, visualize.main, export.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(f"--{name} {name.upper()}" in text for name in LIMITS)
        assert all(f"{number})" in text for number in ("0.5", "1000", "100"))


def test_the_best_score_is_a_word_where_it_can_be():
    assert flags.score_threshold("best") == "best" and flags.score_threshold("0.5") == 0.5
    with pytest.raises(SystemExit):
        parse("--dataset", "shapes", "--score_threshold", "best")


def test_validation_has_no_training_flags():
    with pytest.raises(SystemExit):
        parse("--dataset", "csv", "--csv_train", "a.csv", training=False)


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["--dataset", "shapes"], []),
        (["--dataset", "coco"], ["--coco_path"]),
        (["--dataset", "coco", "--coco_path", "x"], []),
        (["--dataset", "csv"], ["--csv_train"]),
        (
            ["--dataset", "shapes", "--val_share", "0.2", "--crowds_are_objects"],
            ["--val_share", "--crowds_are_objects"],
        ),
        (["--dataset", "csv", "--csv_classes", "x", "--csv_train", "y"], []),
    ],
)
def test_all_missing_data_flags_are_reported(argv, missing):
    errors = flags.check_data_arguments(parse(*argv), ["csv_train"])
    assert len(errors) == len(missing)
    assert all(flag in error for flag, error in zip(missing, errors, strict=True))


def test_csv_flags_name_the_data(tmp_path):
    train, classes = write_csv_data(tmp_path / "train")
    val, _ = write_csv_data(tmp_path / "val", ["a.png,,,,,"])
    args = parse("--dataset", "csv", "--csv_train", train, "--csv_classes", classes)
    assert flags.make_dataset(args, "val", identity) is None  # training alone is allowed
    args.csv_val = val
    data = [flags.make_dataset(args, split, identity) for split in ("train", "val")]
    assert [(type(one), len(one)) for one in data] == [(CSVDataset, 2), (CSVDataset, 1)]
    assert data[0].transform is data[1].transform is identity


def test_folder_flags_name_the_data(tmp_path):
    root = write_coco_data(tmp_path, set_name="learn")
    write_coco_data(tmp_path, set_name="check")
    args = parse("--dataset", "coco", "--coco_path", root, "--coco_train_set", "learn", "--coco_val_set", "check")
    data = [flags.make_dataset(args, split, identity) for split in ("train", "val")]
    assert [(type(one), one.set_name) for one in data] == [(CocoDataset, "learn"), (CocoDataset, "check")]


def test_none_means_no_validation_set(tmp_path):
    args = parse("--dataset", "coco", "--coco_path", write_coco_data(tmp_path), "--coco_val_set", "none")
    assert flags.make_dataset(args, "val", identity) is None and flags.check_data_arguments(args, ["csv_train"]) == []
    assert flags.check_data_arguments(args, ["csv_val"]) == ["--coco_val_set none leaves no data"]


def test_anchor_flags_give_anchors():
    parser = flags.make_parser("test")
    flags.add_anchor_arguments(parser)
    assert anchors_from_settings(parser.parse_args([])).num_anchors == 9
    assert anchors_from_settings(parser.parse_args(["--anchor_ratios", "0.5", "2"])).num_anchors == 6
    with pytest.raises(UserError, match="--anchor_sizes"):
        anchors_from_settings(parser.parse_args(["--anchor_sizes", "32"]))


def test_training_transform_is_made_of_the_flags():
    parser = flags.make_parser("test")
    flags.add_augmentation_arguments(parser)
    flags.add_tile_arguments(parser, training=True)
    parser.set_defaults(min_side=64, max_side=96)
    sample = {"img": gradient(100, 120), "annot": np.array([[10, 10, 60, 60, 0]], dtype=np.float32), "index": 0}
    plain = training_transform(parser.parse_args([]))(sample)
    assert plain["size"] == (64, 77)
    every = ["--jitter", "32", "48", "--random_crop", "0.9", "--colour_jitter", "0.4"]
    assert 32 <= min(training_transform(parser.parse_args(every))(sample)["size"]) <= 48
    args = parser.parse_args(["--flip", "both", "--rotate90", "--scale_jitter", "0.5", "1.5"])
    assert {training_transform(args)(sample)["img"].shape for _ in range(5)} == {(96, 96, 3)}
    *_, augmenter, jitter = training_transform(args).transforms
    assert len(augmenter.flips) == 2 and augmenter.rotate90 and (jitter.low, jitter.high) == (0.5, 1.5)


def test_validation_shapes_are_never_trained_on():
    args = parse("--dataset", "shapes", "--shapes_train", "20", "--shapes_val", "10")
    val = {image.tobytes() for image in flags.make_dataset(args, "val", identity).images}
    assert len(val) == 10
    for args.seed in (0, 1):
        train = {image.tobytes() for image in flags.make_dataset(args, "train", identity).images}
        assert len(train) == 20 and not train & val


def test_the_seed_changes_only_the_training_shapes():
    images = {"train": [], "val": []}
    for seed in ("0", "1"):
        args = parse("--dataset", "shapes", "--shapes_train", "1", "--shapes_val", "1", "--seed", seed)
        for split, drawn in images.items():
            drawn.append(flags.make_dataset(args, split, identity).images[0])
    assert not np.array_equal(*images["train"])
    np.testing.assert_array_equal(*images["val"])


def test_out_dir_is_created_with_its_parents_and_may_exist(tmp_path):
    for _ in range(2):
        folder = make_out_dir(str(tmp_path / "runs" / "one"))
    assert folder == tmp_path / "runs" / "one" and folder.is_dir()


def test_an_out_dir_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"--out_dir {path}: "):
            make_out_dir(str(path))
    with pytest.raises(UserError, match="null"):
        make_out_dir("a\0b")
