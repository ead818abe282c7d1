"""Look for what is wrong with a data set: `python -m retinanet check --dataset ...`."""

import argparse
import sys

from retinanet.commands import flags
from retinanet.data.checks import PICTURES, check_dataset, check_overlap, summary
from retinanet.data.report import DataError, Report
from retinanet.errors import UserError
from retinanet.process import log, script, setup_logging


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags -> values; a usage error exits with 2."""
    parser = flags.make_parser(__doc__.split("\n")[0])
    flags.add_data_arguments(parser, training=True)
    group = parser.add_argument_group("check")
    group.add_argument(
        "--images",
        choices=PICTURES,
        default="decode",
        help="how closely: none (are they there?), quick (some headers), headers (all), decode (every pixel)",
    )
    group.add_argument("--workers", type=flags.non_negative_int, default=2, help="threads that decode pictures")
    parser.set_defaults(seed=0)
    args = parser.parse_args(argv)
    errors = flags.check_data_arguments(args, ["csv_train"])
    if errors:
        parser.error("; ".join(errors))
    return args


@script
def main(argv: list[str] | None = None) -> int:
    """Check as the flags say; the status is 1 where anything is fatal."""
    args = parse_arguments(argv)
    setup_logging()
    report, broken, found = Report(), [], []
    for split in ("train", "val"):
        try:
            dataset = flags.make_dataset(args, split, None)
        except DataError as error:
            report.merge(error.report)
            continue
        except UserError as error:
            broken.append(str(error))
            continue
        if dataset is not None:
            log.info("%s", summary(dataset))
            report.merge(check_dataset(dataset, args.images, split == "train", args.workers))
            found.append(dataset)
    if len(found) == 2:
        check_overlap(*found, args.images == "decode", report)
    errors, warnings = report.errors(args.strict), report.warnings(args.strict)
    if warnings:
        log.info("\nwarnings:\n%s", report.text(warnings))
    if errors or broken:
        log.info("\nerrors:\n%s", "\n".join([*broken, *([report.text(errors)] if errors else [])]))
    log.info("\n%s", "nothing is wrong" if not (errors or warnings or broken) else _verdict(bool(errors or broken)))
    return int(bool(errors or broken))


def _verdict(fatal: bool) -> str:
    return "training would not start" if fatal else "training can start"


if __name__ == "__main__":
    sys.exit(main())
