"""From a JPEG file to a sample, on one core: ours beside torchvision's bare decoder and resize."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from side_by_side import make_parser, measure, report
from skimage.data import astronaut
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2.functional import resize

from retinanet.data.dataset import DetectionDataset
from retinanet.data.transforms import Augmenter, Resizer


def main() -> None:
    """Measure as the flags say."""
    parser = make_parser(__doc__, repeats=20)
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.jpg"
        Image.fromarray(astronaut()).resize((640, 480)).save(path, quality=90)
        resizer, augmenter = Resizer(), Augmenter()
        boxes = np.array([[10, 20, 200, 300, 0]], dtype=np.float32)
        dataset = DetectionDataset(
            [str(path)], boxes, np.zeros(1, dtype=int), ["person"], lambda sample: resizer(augmenter(sample))
        )
        programs = {
            "ours: read, flip, resize, pad": lambda: dataset[0],
            "bare: decode_jpeg, resize": lambda: resize(
                decode_jpeg(read_file(str(path)), ImageReadMode.RGB), [608, 811], antialias=True
            ),
        }
        seconds = measure(programs, args.repeats)
    names = list(programs)
    report("640 x 480 JPEG -> 608-px sample, one core", seconds, {(names[0], names[1]): 1.3}, args.json)


if __name__ == "__main__":
    main()
