"""The package keeps its structure: imports point downwards, and the original's import paths hold no logic."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "retinanet"
PAPER = ("anchors", "boxes", "matcher", "losses", "resnet", "model", "postprocess")
IMPORT_PATHS = ("dataloader", "coco_eval", "csv_eval", "utils")
BASE = ("errors", "process", "signals")
USE = ("detection", "inference")

# Part of the package -> the parts that it may import; a name stands for everything below it.
RULES = {
    "errors": (),
    "signals": (),
    "process": ("errors", "signals"),
    **dict.fromkeys(PAPER, PAPER),
    "model": (*PAPER, "fused_loss", "sparse_head"),
    "fused_loss": PAPER,
    "sparse_head": PAPER,
    "data": ("data", "boxes", *BASE),
    "training": ("training", "data", *PAPER, "fused_loss", "inference", *BASE),
    "detection": ("data", *PAPER, *BASE),
    "inference": ("data", "training.checkpoint", "training.settings", "detection", *PAPER, *BASE),
    "visual": ("visual", "data", *PAPER, "sparse_head", *BASE),
    "evaluation": ("evaluation", "data", *PAPER, "detection", "visual.charts", *BASE),
    "commands": ("commands", "results", "data", "training", "evaluation", "visual", *USE, *PAPER, "fused_loss", *BASE),
    "dataloader": ("data",),
    "coco_eval": ("evaluation",),
    "csv_eval": ("evaluation",),
    "utils": ("boxes", "resnet"),
    "results": ("data", "training", "evaluation", "visual", *PAPER, *BASE),
    "running": ("results", "data", "training", "evaluation", "visual", *USE, *PAPER, *BASE),
    "api": ("running", "results", "data", "training", "evaluation", "visual", *USE, *PAPER, *BASE),
    "__init__": ("inference", "api"),
    "__main__": ("commands",),
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def is_module(name):
    return (PACKAGE / name.replace(".", "/")).with_suffix(".py").is_file() or (
        PACKAGE / name.replace(".", "/")
    ).is_dir()


def imported(path):
    """All modules that a file imports, those of the package without its name: `data.images`, `torch`, ..."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                within = f"{node.module}.{alias.name}".removeprefix("retinanet.")
                yield within if is_module(within) else node.module.removeprefix("retinanet.")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("retinanet.") for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_downwards(file):
    part = file.parts[0].removesuffix(".py")
    allowed = RULES[part]
    for module in imported(PACKAGE / file):
        if is_module(module):
            assert any(f"{module}.".startswith(f"{name}.") for name in allowed), f"{file} imports {module}"
        elif part in (*PAPER, "fused_loss", "sparse_head"):
            allowed_outside = ("torch", "torchvision", "math", "collections", "typing", "pathlib", "pickle")
            assert module.split(".")[0] in allowed_outside, module


@pytest.mark.parametrize("path", IMPORT_PATHS)
def test_the_originals_import_paths_hold_only_imports(path):
    docstring, *statements = ast.parse((PACKAGE / f"{path}.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    *imports, names = statements
    assert all(isinstance(statement, ast.ImportFrom) for statement in imports)
    assert isinstance(names, ast.Assign) and names.targets[0].id == "__all__"


def test_tests_mirror_the_package():
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    folders = {str(path.parent) for path in FILES if path.parent != Path()}
    assert {str(path.parent) for path in tests} == folders | {"."}
    for folder in folders:
        modules = {path.stem for path in FILES if str(path.parent) == folder}
        named = {path.stem.removeprefix("test_") for path in tests if str(path.parent) == folder}
        assert named - modules <= {"fuzz", "commands"}, f"tests/{folder} tests what is not in retinanet/{folder}"
