"""Training with train.py from image files, beside bare training steps with the same batches in memory."""

import contextlib
import io
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from side_by_side import make_parser, parse, report, timed
from skimage.data import astronaut

import train
from retinanet.data.csv import CSVDataset
from retinanet.data.loader import make_loader
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import Resizer, normalize
from retinanet.model import resnet
from retinanet.process import autocast, choose_precision
from retinanet.training.log import read_log
from retinanet.training.recipes import RECIPES, make_optimizer


def write_data(folder: Path, num_images: int) -> list[str]:
    """Write JPEG files of 640 x 480 pixels, each with ten boxes, as CSV data; returns the flags for this data."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(num_images):
        picture = np.roll(astronaut(), rng.integers(0, 512), axis=1)
        Image.fromarray(picture).resize((640, 480)).save(folder / f"{number}.jpg", quality=90)
        for x, y, size in rng.integers((0, 0, 20), (400, 240, 240), (10, 3)):
            lines.append(f"{number}.jpg,{x},{y},{x + size},{y + size},thing\n")
    (folder / "train.csv").write_text("".join(lines))
    (folder / "classes.csv").write_text("thing,0\n")
    return ["--csv_train", str(folder / "train.csv"), "--csv_classes", str(folder / "classes.csv")]


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=2)
    parser.add_argument("--images", type=int, default=32, help="number of images")
    parser.add_argument("--depth", type=int, default=18, help="layers of the ResNet")
    parser.add_argument("--min_side", type=int, default=320, help="pixels of the resized short side")
    parser.add_argument("--batch", type=int, default=4, help="images per batch")
    parser.add_argument("--workers", type=int, default=2, help="processes of train.py that read images")
    args = parse(parser)
    precision = choose_precision("auto", args.device)
    recipe = RECIPES["scratch"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_flags = write_data(folder, args.images)
        dataset = CSVDataset(folder / "train.csv", folder / "classes.csv", Resizer(args.min_side))
        batches = list(make_loader(dataset, args.batch, 0, AspectRatioBasedSampler(dataset, args.batch)))
        net = resnet(args.depth, 1).train().to(args.device, memory_format=torch.channels_last)
        optimizer = make_optimizer(net, recipe, recipe.lr)

        def bare() -> None:
            for batch in batches:
                images, annotations = normalize(batch["img"].to(args.device)), batch["annot"].to(args.device)
                with autocast(args.device, precision):
                    losses = torch.cat(net([images, annotations]))
                losses.sum().backward()
                optimizer.step()
                optimizer.zero_grad()

        flags = ["--dataset", "csv", *data_flags, "--depth", args.depth, "--weights", "none", "--recipe", "scratch"]
        flags += ["--min_side", args.min_side, "--batch_size", args.batch, "--device", args.device]
        flags += ["--workers", args.workers, "--epochs", 2, "--out_dir", folder / "run"]

        def seconds_of_script() -> float:
            with contextlib.redirect_stdout(io.StringIO()):
                assert train.main(list(map(str, flags))) == 0
            # The last entry is that of the second epoch; the first also has the start of the workers.
            return 1 / read_log(folder / "run" / "log.jsonl")[-1]["images_per_second"]

        bare()
        rounds = [(seconds_of_script(), timed(bare, args.device) / args.images) for _ in range(args.repeats)]
    ours, floor = (statistics.median(times) for times in zip(*rounds, strict=True))
    seconds = {"train.py, an image": ours, "bare step, an image": floor}
    title = f"training ResNet-{args.depth} on JPEG files, --min_side {args.min_side}, {args.batch} images per batch"
    report(title, seconds, {tuple(seconds): 1 / 0.95}, args.json)


if __name__ == "__main__":
    main()
