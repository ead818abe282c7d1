"""Draw data, anchors, assignment, features, losses and detections, as PNG files."""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch

from retinanet import detection, inference, process
from retinanet.anchors import Anchors
from retinanet.commands import flags
from retinanet.commands.detect_files import detect_files
from retinanet.data.dataset import DetectionDataset
from retinanet.data.loader import make_loader, read_sample
from retinanet.data.report import counted
from retinanet.data.transforms import normalize
from retinanet.errors import UserError, output_file
from retinanet.evaluation.errors import judge
from retinanet.model import RetinaNet
from retinanet.process import log, progress, script
from retinanet.results import check_csv, write_csv
from retinanet.training.checkpoint import load_model
from retinanet.training.files import make_out_dir
from retinanet.training.settings import (
    AUGMENTATIONS,
    Settings,
    anchors_from_settings,
    augmentation_errors,
    training_transform,
)
from retinanet.training.weights import match_classes
from retinanet.visual import anchor_fit, anchor_report, anchor_views, heatmaps, views
from retinanet.visual.drawing import draw_boxes, save_image, side_by_side

SHOWS = {
    "truth": "annotations as training sees them; with --augment, after augmentation",
    "detections": "detections beside the ground truth: right ones solid, false ones dashed, missed boxes dotted",
    "anchors": "the anchors of one location of each pyramid level",
    "matches": "the positive anchors of each box, and the ignored anchors; boxes without a positive anchor are red",
    "tiles": "where training computes the box head: the tiles of each level that hold a positive anchor",
    "pyramid": "the activations and class probabilities of each level, as heat maps",
    "loss": "where the class loss comes from: maps, and the paper's Figure 4",
    "anchor_fit": "how well the anchors fit the boxes of the training set, and which would fit better",
}
NEED_MODEL = ("detections", "pyramid", "loss")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; a usage error lists all contradictions and exits with 2."""
    parser = flags.make_parser(__doc__)
    shows = "; ".join(f"{name}: {text}" for name, text in SHOWS.items())
    parser.add_argument("--show", choices=SHOWS, default="detections", help=f"what to draw {flags.DEFAULT}. {shows}")
    parser.add_argument("--model", help=f"checkpoint, such as best.pt; --show {', '.join(NEED_MODEL)} need it")
    text = "instead of a data set: images, videos, folders of them, or patterns"
    parser.add_argument("--images", nargs="+", metavar="PATH", help=text)
    text = f"for videos: process only every N-th frame {flags.DEFAULT}"
    parser.add_argument("--every", type=flags.positive_int, default=1, metavar="N", help=text)
    flags.add_data_arguments(parser, training=True, required=False)
    group = parser.add_argument_group("choice of images")
    group.add_argument("--split", choices=["train", "val"], help="which set (default: val; anchor_fit: train)")
    group.add_argument("--indices", type=flags.non_negative_int, nargs="+", help="images of the set by number, from 0")
    text = f"number of images, without --indices {flags.DEFAULT}"
    group.add_argument("--limit", type=flags.positive_int, default=12, help=text)
    group.add_argument("--augment", action="store_true", help="augment as in the first epoch of training with --seed")
    text = f"seed of augmentation, shapes and the search for anchors {flags.DEFAULT}"
    group.add_argument("--seed", type=flags.non_negative_int, default=0, help=text)
    group.add_argument("--min_side", type=flags.positive_int, help="short side, pixels (default: the model's, or 608)")
    group.add_argument("--max_side", type=flags.positive_int, help="limit of the long side (default: model's, or 1024)")
    flags.add_augmentation_arguments(parser)
    flags.add_anchor_arguments(parser)
    group = parser.add_argument_group("assignment")
    text = "smallest IoU at which a box's best anchor is positive (default: as in the model's training; paper: 0.4)"
    group.add_argument("--best_match_iou", type=flags.fraction, help=text)
    flags.add_detection_arguments(parser, best=True)
    flags.add_tile_arguments(parser, training=True)
    flags.add_machine_arguments(parser)
    parser.add_argument("--batch_size", type=flags.positive_int, default=4, help=f"images per batch {flags.DEFAULT}")
    group = parser.add_argument_group("output")
    text = f"images in a row of detections.png {flags.DEFAULT}"
    group.add_argument("--columns", type=flags.positive_int, default=3, help=text)
    group.add_argument("--out_dir", default="runs/pictures", help=f"folder for the PNG files {flags.DEFAULT}")
    group.add_argument("--save_csv", metavar="FILE.csv", help=flags.SAVE_CSV)
    args = parser.parse_args(argv)
    args.split = args.split or ("train" if args.show == "anchor_fit" else "val")
    if errors := contradictions(args):
        parser.error("; ".join(errors))
    return args


def contradictions(args: argparse.Namespace) -> list[str]:
    """A message for each contradiction among the flags."""
    errors = []
    if (args.dataset is None) == (args.images is None):
        errors.append("give either --dataset or --images")
    if args.dataset:
        errors += flags.check_data_arguments(args, ["csv_train" if args.split == "train" else "csv_val"])
        if args.show in NEED_MODEL and not args.model:
            errors.append(f"--show {args.show} needs --model")
    if args.images and (args.show != "detections" or not args.model):
        errors.append("--images needs --model and --show detections")
    if args.every > 1 and not args.images:
        errors.append("--every is for videos of --images")
    if args.tile is not None and args.show not in ("detections", "anchor_fit") and not args.augment:
        errors.append(f"--tile is for --show detections and anchor_fit, and for --augment, not --show {args.show}")
    if args.save_csv and args.show != "detections":
        errors.append(f"--save_csv is for --show detections, not {args.show}")
    if args.model and (args.anchor_scales or args.anchor_ratios or args.anchor_sizes):
        errors.append("--model brings its own anchors: leave out --anchor_scales, --anchor_ratios and --anchor_sizes")
    if args.augment and args.show in ("detections", "anchor_fit"):
        errors.append(f"--show {args.show} takes no --augment")
    if not args.augment and any(getattr(args, name) != Settings.defaults()[name] for name in AUGMENTATIONS):
        errors.append(f"{', '.join(f'--{name}' for name in AUGMENTATIONS)} need --augment")
    return errors + augmentation_errors(vars(args))


def choose_indices(args: argparse.Namespace, dataset: DetectionDataset) -> list[int]:
    """The images to draw.

    Raises:
        UserError: the data set has fewer images.
    """
    if args.indices is None:
        return list(range(min(args.limit, len(dataset))))
    if max(args.indices) >= len(dataset):
        raise UserError(f"--indices {max(args.indices)}: the set has {counted(len(dataset), 'image')}, numbered from 0")
    return args.indices


def show_inputs(
    args: argparse.Namespace, dataset: DetectionDataset, net: RetinaNet | None, anchors: Anchors, device: torch.device
) -> int:
    """Draw annotations, anchors, matches, tiles, pyramid or loss of each chosen image; returns the number of images."""
    folder, names = make_out_dir(args.out_dir), list(dataset.labels.values())
    indices, losses = choose_indices(args, dataset), []
    for index in progress(indices, args.show):
        sample = read_sample(dataset, args.seed, 0, index)
        image, annotations = views.to_image(sample["img"]), torch.as_tensor(sample["annot"])
        images = normalize(torch.from_numpy(image).permute(2, 0, 1)[None].to(device))
        path, boxes = folder / f"{args.show}_{index:05d}.png", annotations.numpy()
        if args.show == "truth":
            title = f"{index}: {Path(dataset.image_path(index)).name}, {counted(len(boxes), 'box')}"
            save_image(side_by_side([views.draw_annotations(image, boxes, names)], [title]), path)
        elif args.show == "anchors":
            save_image(anchor_views.draw_anchors(image, boxes, anchors), path)
        elif args.show == "matches":
            grid = anchors.of_size(*image.shape[:2])
            save_image(anchor_views.draw_matches(image, boxes, grid, names, args.best_match_iou), path)
        elif args.show == "tiles":
            save_image(anchor_views.draw_tiles(image, boxes, anchors, args.best_match_iou), path)
        elif args.show == "pyramid":
            heatmaps.draw_pyramid(net, images, image, path)
        else:
            drawn = draw_boxes(image, boxes[:, :4], boxes[:, 4].astype(int))
            losses.append(heatmaps.draw_loss(net, images, annotations, drawn, path))
    if losses:
        heatmaps.draw_cumulative_loss(losses, net.focalLoss.alpha, folder / "focal_loss.png")
    return len(indices)


def show_detections(
    args: argparse.Namespace, dataset: DetectionDataset, net: RetinaNet, info: dict[str, Any], device: torch.device
) -> int:
    """Draw detections beside the ground truth, a file per image and a sheet of all; returns the number of images."""
    folder, names = make_out_dir(args.out_dir), list(dataset.labels.values())
    if args.save_csv:
        check_csv(args.save_csv)
    indices = choose_indices(args, dataset)
    tiling = inference.choose_tiling(info, flags.given_tiles(args))
    loader = make_loader(dataset, args.batch_size, args.workers, indices=indices, device=device, tiling=tiling)
    precision = process.choose_precision(args.precision, device)
    limits = inference.detection_limits(info, flags.given_limits(args), for_use=True)
    detections = detection.detect(net, loader, device, precision, **limits)
    if args.save_csv:
        write_csv(args.save_csv, [(dataset.image_path(index), detections[index]) for index in indices], names)
    judged = judge(dataset, detections)
    for index in progress(indices, "drawing"):
        image, annotations = dataset.load_image(index), dataset.load_annotations(index)
        picture = views.draw_detections(image, annotations, judged[index], names)
        save_image(picture, folder / f"detections_{index:05d}.png")
    save_image(views.draw_detections_sheet(dataset, judged, indices, args.columns), folder / "detections.png")
    return len(indices)


def show_anchor_fit(args: argparse.Namespace, dataset: DetectionDataset, anchors: Anchors) -> None:
    """Measure how well the anchors fit the boxes of the data set, and search for better ones."""
    folder = make_out_dir(args.out_dir)
    sides = (None, None) if args.tile else (args.min_side, args.max_side)
    fit = anchor_fit.measure(dataset, anchors, *sides, args.best_match_iou)
    if not len(fit.iou):
        raise UserError("the data set has no boxes")
    better = anchor_fit.search(fit, args.seed)
    log.info("%s", anchor_report.report(fit, better, dataset))
    content = anchor_report.as_dict(fit, better, dataset)
    output_file(folder / "anchor_fit.json").write_text(json.dumps(content, indent=1))
    anchor_report.draw(fit, better, folder / "anchor_fit.png")
    log.info("\nwritten to %s: anchor_fit.json, anchor_fit.png", folder)


@script
def main(argv: list[str] | None = None) -> None:
    """Draw as the flags say."""
    args = parse_arguments(argv)
    process.setup_logging()
    device = process.choose_device(args.device)
    process.seed_everything(args.seed)
    net, info = load_model(args.model) if args.model else (None, {"min_side": 608, "max_side": 1024})
    args.min_side = args.min_side or info["min_side"]
    args.max_side = max(args.max_side or info["max_side"], args.min_side)
    if net:
        net.to(device, memory_format=torch.channels_last)
        if args.best_match_iou is None:
            args.best_match_iou = net.focalLoss.best_match_iou
        net.focalLoss.best_match_iou = args.best_match_iou
    args.pixel_range = args.pixel_range or info.get("pixel_range")
    if args.images:
        detect_files(args, net, info, device)
        return
    anchors = copy.deepcopy(net.anchors).cpu() if net else anchors_from_settings(args)
    resizer = inference.make_resizer(info, args.min_side, args.max_side)
    transform = training_transform(args) if args.augment else resizer
    dataset = flags.make_dataset(args, args.split, transform, info.get("class_names"))
    if net:
        net, info = match_classes(args.model, net, info, dataset)
    if args.show == "anchor_fit":
        show_anchor_fit(args, dataset, anchors)
        return
    with dataset.scaled():
        if args.show == "detections":
            count = show_detections(args, dataset, net, info, device)
        else:
            count = show_inputs(args, dataset, net, anchors, device)
    log.info("%s of %s: %s", args.show, counted(count, "image"), args.out_dir)


if __name__ == "__main__":
    sys.exit(main())
