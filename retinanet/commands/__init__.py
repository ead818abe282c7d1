"""The command line: `python -m retinanet COMMAND`, or `retinanet COMMAND` after `pip install .`.

`flags` holds the flags that the commands share. `check`, `convert` and `export` are in this package; `train`,
`validate` and `visualize` run the scripts of these names.
"""

import argparse
import importlib
import sys

COMMANDS = {
    "train": ("train", "train a detector"),
    "validate": ("validate", "score a detector"),
    "visualize": ("visualize", "draw data, anchors, features, losses and detections"),
    "check": ("retinanet.commands.check", "find errors in a data set"),
    "convert": ("retinanet.commands.convert", "convert a data set between CSV, COCO, VOC and YOLO"),
    "export": ("retinanet.commands.export", "export a detector to ONNX, torch.export or AOTInductor"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command, or list the commands; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(["commands:", *(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())])
    parser = argparse.ArgumentParser(
        prog="retinanet",
        usage="retinanet COMMAND ...",
        description=listing,
        epilog="retinanet COMMAND --help lists the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help()
        return 0
    sys.argv[0] = f"retinanet {command}"  # for the command's usage line
    return importlib.import_module(COMMANDS[command][0]).main(argv[1:])
