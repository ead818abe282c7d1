"""The cost of tiles: detection in the tiles of a large image, beside detection in as many images of a tile's size."""

import numpy as np
import torch
from networks import add_precision_argument
from side_by_side import make_parser, measure, parse, report

from retinanet.data.tiles import Tiling
from retinanet.data.transforms import Resizer, normalize
from retinanet.detection import detect_images
from retinanet.model import ARCHITECTURES, resnet
from retinanet.process import autocast, choose_precision


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--depth", type=int, choices=sorted(ARCHITECTURES), default=50, help="layers of the ResNet")
    parser.add_argument("--height", type=int, default=1536, help="height of the large image, pixels")
    parser.add_argument("--width", type=int, default=2048, help="width of the large image, pixels")
    parser.add_argument("--tile", type=int, default=512, help="side of the tiles, pixels, less than height and width")
    parser.add_argument("--overlap", type=float, default=0.25, help="share of the side by which tiles overlap")
    parser.add_argument("--batch", type=int, default=4, help="tiles per batch")
    add_precision_argument(parser)
    args = parse(parser)
    tiling, precision = Tiling(args.tile, args.overlap), choose_precision(args.precision, args.device)
    count = tiling.count(args.height, args.width)
    net = resnet(args.depth, 1).eval().to(args.device, memory_format=torch.channels_last)
    image = np.random.default_rng(0).integers(0, 256, (args.height, args.width, 3), dtype=np.uint8)
    tile = torch.from_numpy(image[: args.tile, : args.tile].copy()).permute(2, 0, 1)[None].to(args.device)
    batches = [tile.repeat(min(args.batch, count - start), 1, 1, 1) for start in range(0, count, args.batch)]
    with torch.no_grad():  # make the network find 200 candidates per tile
        torch.nn.init.normal_(net.classificationModel.output.weight, std=0.01)
        net.classificationModel.output.bias -= net.heads(normalize(tile))[0].flatten().topk(200).values[-1] + 2.95
    found = []

    def by_tiles() -> None:
        found[:] = detect_images(net, [image], Resizer(), args.batch, precision, tiling, max_detections=None)

    def plain() -> None:
        for images in batches:
            with autocast(args.device, precision):
                net.detect(normalize(images), max_detections=None)

    seconds = measure({"tiles": by_tiles, "images of a tile's size": plain}, args.repeats, args.device)
    title = f"ResNet-{args.depth}, {args.height} x {args.width} pixels as {count} tiles of {args.tile}, {precision}"
    extra = {"pixels of tiles / of image": count * args.tile**2 / (args.height * args.width)}
    extra["detections"] = float(len(found[0][1].scores))
    report(title, seconds, {("tiles", "images of a tile's size"): 1.15}, args.json, **extra)


if __name__ == "__main__":
    main()
