"""What to do after training: commands with the data and the model of the run."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from retinanet.commands import flags


def data_flags(args: argparse.Namespace, training: bool) -> list[str]:
    """The flags about the data that differ from their defaults; without `training`, only those for validation."""
    parser = argparse.ArgumentParser()
    flags.add_data_arguments(parser, training)
    chosen = ["--dataset", args.dataset]
    for name, default in vars(parser.parse_args(chosen)).items():
        value = getattr(args, name)
        if value != default:
            values = value if isinstance(value, tuple) else [] if value is True else [value]  # --pixel_range
            chosen += [f"--{name}", *map(str, values)]
    return chosen


def program(command: str) -> list[str]:
    """The words that start another command in the same way as this one: as a script, or as `retinanet COMMAND`."""
    started = Path(sys.argv[0])
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    if started.name != "train.py":
        return ["retinanet", command] if shutil.which("retinanet") else [python, "-m", "retinanet", command]
    script = started.with_name(f"{command}.py")
    return [python, str(script)] if script.exists() else [python, "-m", "retinanet", command]


def next_steps(args: argparse.Namespace, out_dir: Path, best: Path | None, image: str) -> str:
    """The commands to run next, quoted for a shell, from the flags of train.py and the folder of the run.

    `best` is the run's best.pt, None without a validation set; `image` is a training image, which may have no file.
    """
    model, data = ["--model", str(best or out_dir / "last.pt")], data_flags(args, training=best is None)
    steps = []
    if best:
        steps += [("validate", [*data, *model, "--analyse", "--out", str(out_dir / "validation")])]
    else:
        data += ["--split", "train"]
    steps += [("visualize", [*data, *model, "--out_dir", str(out_dir / "detections")])]
    if not best and Path(image).is_file():
        steps += [("visualize", [*model, "--images", image, "--out_dir", str(out_dir / "found")])]
    steps += [("export", [*model, "--dynamic", "--with_nms"])]
    return "\n  ".join(["next:", *(shlex.join([*program(command), *given]) for command, given in steps)])
