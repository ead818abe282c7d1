import math
import re
from pathlib import Path

import pytest

import visualize
from retinanet.anchors import Anchors

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "understanding.md").read_text()


def test_every_picture_is_there_and_every_picture_is_shown():
    shown = set(re.findall(r"\]\((?:docs/)?(pictures/[^)]+)\)", TEXT + (ROOT / "README.md").read_text()))
    assert shown == {f"pictures/{path.name}" for path in (ROOT / "docs" / "pictures").iterdir()}


def test_every_line_of_code_that_is_named_exists():
    named = 0
    for line in re.findall(r"^Code: .*", TEXT, flags=re.MULTILINE):
        for part in line.split(";"):
            path, *names = re.findall(r"`([^`]+)`", part)
            source = (ROOT / path).read_text()
            for name in names:
                assert re.search(rf"^\s*(def {name}\(|class {name}\b|{name} = )", source, flags=re.MULTILINE), name
                named += 1
    assert named > 12


@pytest.mark.parametrize("row", range(5))
def test_the_table_of_anchor_sizes_is_that_of_the_anchors(row):
    anchors = Anchors()
    level, stride = anchors.pyramid_levels[row], anchors.strides[row]
    sides = [anchors.sizes[row] * scale for scale in anchors.scales]
    low, high = sides[0] / math.sqrt(2), sides[-1] * math.sqrt(2)
    cells = f"| P{level} | {stride} px | {', '.join(f'{side:.0f}' for side in sides)} px | {low:.0f} to {high:.0f} px |"
    assert cells in TEXT


def test_every_command_is_one_that_the_script_takes():
    commands = re.findall(r"^python visualize\.py (.+)$", TEXT, flags=re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        args = visualize.parse_arguments(command.replace("$D", "--dataset shapes --out_dir docs/pictures").split())
        assert args.out_dir == "docs/pictures"


def test_the_readme_names_every_file_of_the_package():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("retinanet/\n") :].split("```")[0]
    files = [path.name for path in (ROOT / "retinanet").rglob("*.py") if not path.name.startswith("__")]
    assert [name for name in files if not re.search(rf"\b{re.escape(name)}\b", tree)] == []
