import shlex
import sys
from pathlib import Path

import pytest

import train
import validate
import visualize
from retinanet.commands import export
from retinanet.commands.next_steps import next_steps

PARSERS = {"validate": validate.parse_arguments, "visualize": visualize.parse_arguments}
CSV = ["--dataset", "csv", "--csv_train", "my data/train.csv", "--csv_classes", "c.csv"]


def steps(flags, best, image="none.jpg"):
    """The commands as the shell splits them."""
    first, *lines = next_steps(train.parse_arguments(flags), Path("runs/a b"), best, image).split("\n")
    assert first == "next:"
    return [shlex.split(line) for line in lines]


def test_with_a_validation_set_the_data_are_those_of_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path(train.__file__))])
    flags = [*CSV, "--csv_val", "my data/val.csv", "--skip_bad", "--epochs", "3", "--pixel_range", "0", "4095.5"]
    found = steps(flags, Path("runs/a b/best.pt"))
    assert [Path(command[1]).name for command in found] == ["validate.py", "visualize.py", "-m"]
    assert all(Path(command[1]).is_file() for command in found[:2])
    for name, command in zip(PARSERS, found, strict=False):
        args = PARSERS[name](command[2:])
        assert (args.csv_val, args.csv_classes, args.skip_bad) == ("my data/val.csv", "c.csv", True)
        assert args.model == "runs/a b/best.pt" and args.pixel_range == (0, 4095.5)
    assert found[2][2:] == ["retinanet", "export", "--model", "runs/a b/best.pt", "--dynamic", "--with_nms"]
    assert export.parse_arguments(found[2][4:]).model == "runs/a b/best.pt"


@pytest.mark.parametrize("flags", [CSV, ["--dataset", "voc", "--voc_path", "d", "--voc_val_set", "none"]])
def test_without_one_the_commands_draw_training_images(monkeypatch, flags, tmp_path):
    monkeypatch.setattr(sys, "argv", ["retinanet train"])
    image = tmp_path / "a.jpg"
    image.touch()
    found = steps(flags, None, str(image))
    words = [command[command.index("visualize") + 1 :] for command in found[:2]]
    of_set, of_image = map(visualize.parse_arguments, words)
    assert (of_set.dataset, of_set.split, of_set.model) == (flags[1], "train", "runs/a b/last.pt")
    assert (of_image.images, of_image.model) == ([str(image)], "runs/a b/last.pt")
    assert len(steps(flags, None)) == 2  # generated images have no files
