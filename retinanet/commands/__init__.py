"""The command line: `python -m retinanet COMMAND`.

`flags` are those that several commands share; `check`, `convert` and `export` live here, `train`, `validate` and
`visualize` in the scripts of these names.
"""

import importlib
import sys

COMMANDS = {
    "train": ("train", "train a detector"),
    "validate": ("validate", "score a detector"),
    "visualize": ("visualize", "draw data, anchors, features, losses and detections"),
    "check": ("retinanet.commands.check", "look for what is wrong with a data set"),
    "convert": ("retinanet.commands.convert", "convert a data set between CSV, COCO, VOC and YOLO"),
    "export": ("retinanet.commands.export", "export a detector to ONNX, torch.export or AOTInductor"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; without one, list them. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()]
        usage = "\n".join(["usage: retinanet COMMAND ...", "", *lines, "", "retinanet COMMAND --help lists its flags."])
        wanted_help = not argv or argv[0] in ("-h", "--help")
        stream = sys.stdout if wanted_help else sys.stderr
        stream.write(("" if wanted_help else f"error: there is no command {argv[0]!r}\n") + usage + "\n")
        return 0 if wanted_help else 2
    module, _ = COMMANDS[argv[0]]
    sys.argv[0] = f"retinanet {argv[0]}"
    return importlib.import_module(module).main(argv[1:])
