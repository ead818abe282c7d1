"""Find errors in a data set before training."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from retinanet.commands import flags
from retinanet.data.checks import DEPTHS, check_dataset, compare_sets, summary, write_skipped
from retinanet.data.report import DataError, Report
from retinanet.errors import UserError
from retinanet.process import log, script, setup_logging


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; a usage error lists all contradictions and exits with 2."""
    parser = flags.make_parser(__doc__)
    flags.add_data_arguments(parser, training=True)
    group = parser.add_argument_group("check")
    text = "what to read of images: none (do they exist?), quick (some headers), headers (all), decode (all pixels)"
    group.add_argument("--images", choices=DEPTHS, default="decode", help=f"{text} {flags.DEFAULT}")
    text = f"threads that decode images {flags.DEFAULT}"
    group.add_argument("--workers", type=flags.non_negative_int, default=2, help=text)
    parser.set_defaults(seed=0)
    args = parser.parse_args(argv)
    if errors := flags.check_data_arguments(args, ["csv_train"]):
        parser.error("; ".join(errors))
    return args


@script
def main(argv: list[str] | None = None) -> int:
    """Check a data set as the flags say; the exit status is 1 if training would not start."""
    args = parse_arguments(argv)
    setup_logging()
    report, broken, found = Report(skip_bad=args.skip_bad), [], []
    for split in ("train", "val"):
        # Tolerant, so that an error in one place does not hide errors in others.
        own = Report(tolerant=True, skip_bad=args.skip_bad)
        try:
            dataset = flags.make_dataset(args, split, None, report=own)
        except DataError as error:
            report.merge(error.report)
        except UserError as error:
            broken.append(str(error))
            report.merge(own)
        else:
            if dataset is not None:
                log.info("%s", summary(dataset))
                with dataset.scaled() if args.images != "none" else nullcontext():
                    report.merge(check_dataset(dataset, args.images, split == "train", args.workers))
                found.append(dataset)
    if len(found) == 2:
        compare_sets(*found, args.images == "decode", report)
    errors, warnings = report.errors(args.strict), report.warnings(args.strict)
    if warnings:
        log.info("\nwarnings:\n%s", report.text(warnings))
    if args.skip_bad:
        write_skipped(Path(), found)
    if errors:
        broken.append(report.text(errors))
    if broken:
        log.info("\nerrors:\n%s", "\n".join(dict.fromkeys(broken)))
        log.info("\ntraining would not start")
        return 1
    log.info("\n%s", "training can start" if warnings else "no errors found")
    return 0
