"""From a JPEG file to a sample, on one core: our input beside only decoding and resizing, and each decoder alone."""

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from side_by_side import make_parser, measure, parse, report
from skimage.data import astronaut
from torchvision.transforms.v2.functional import resize

from retinanet.data import images
from retinanet.data.dataset import DetectionDataset
from retinanet.data.transforms import Augmenter, Resizer


def pillow(data: torch.Tensor) -> np.ndarray:
    """Decode the bytes of a file with Pillow: [H, W, 3]."""
    with Image.open(io.BytesIO(data.numpy())) as image:
        return np.asarray(image)


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=20)
    parser.set_defaults(threads=1)
    args = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.jpg"
        Image.fromarray(astronaut()).resize((640, 480)).save(path, quality=90)
        resizer, augmenter = Resizer(), Augmenter()
        boxes = np.array([[10, 20, 200, 300, 0]], dtype=np.float32)
        dataset = DetectionDataset(
            [str(path)], boxes, np.zeros(1, dtype=int), ["person"], lambda sample: resizer(augmenter(sample))
        )
        decoders = images.JPEG_DECODERS or {"Pillow": lambda data: torch.from_numpy(pillow(data)).permute(2, 0, 1)}
        first, decode = next(iter(decoders.items()))

        def bare() -> torch.Tensor:
            return resize(decode(torch.from_numpy(np.fromfile(path, np.uint8))), [608, 811], antialias=True)

        data = torch.from_numpy(np.fromfile(path, np.uint8))
        programs = {"ours: read, flip, resize, pad": lambda: dataset[0], f"bare: {first}, resize": bare}
        programs |= {f"decode: {name}": lambda decode=decode: decode(data) for name, decode in decoders.items()}
        programs["decode: Pillow"] = lambda: pillow(data)
        seconds = measure(programs, args.repeats)
    names = list(programs)
    report("640 x 480 JPEG -> 608-px sample, one core", seconds, {(names[0], names[1]): 1.3}, args.json)


if __name__ == "__main__":
    main()
