"""Class names: lists of them in files, and messages about names that differ."""

from collections.abc import Sequence
from pathlib import Path

from retinanet.data.dataset import DetectionDataset
from retinanet.data.reading import read_text
from retinanet.data.report import Report
from retinanet.data.tables import read_rows
from retinanet.errors import UserError, listed, shown, suggestion


def placeholder_names(num_classes: int) -> list[str]:
    """Class names for weights that come without any: `class 0`, `class 1`, ..."""
    return [f"class {label}" for label in range(num_classes)]


def read_class_list(path: Path) -> list[str] | None:
    """The class names in a file such as classes.txt, one per line; None if the file does not exist."""
    if not path.is_file():
        return None
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if "" in names:
        raise UserError(f"{path}:{names.index('') + 1}: is blank, but the lines count the class ids; remove it")
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: needs one class name per line, without repeats")
    return names


def read_class_ids(path: Path, report: Report) -> list[str]:
    """Class names in the order of their ids, from lines `class_name,id`; a DataError lists all that is wrong."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for numbers, rows in read_rows(path, 2, report):
        for number, row in zip(numbers, rows, strict=True):
            row = [field.strip() for field in row]
            if not any(row):
                continue
            name, class_id, where = row[0], row[-1], f"{path}:{number}"
            if len(row) != 2:
                report.add("class list", where, f"expected `class_name,id`, found {len(row)} columns")
            elif not (class_id.isascii() and class_id.isdecimal() and len(class_id) < 10):
                if not names and not report.errors() and class_id.lower() in ("id", "class_id", "label", "index"):
                    report.add("header row", where, f"the column names {shown(','.join(row))} are skipped")
                    continue
                hint = " (are the two columns swapped?)" if name.isdecimal() else ""
                report.add("class list", where, f"the class id must be a whole number, not {shown(class_id)}{hint}")
            elif not name or name in taken or int(class_id) in names:
                message = f"class {shown(name)} or its id {class_id} is repeated, or the name is empty"
                report.add("class list", where, message)
            else:
                names[int(class_id)] = name
                taken.add(name)
    if not report.errors() and sorted(names) != list(range(max(1, len(names)))):
        report.add("class list", str(path), f"class ids must run from 0 without gaps, found {shown(sorted(names))}")
    report.raise_errors()
    return [names[label] for label in sorted(names)]


def unknown_class(name: str, known: Sequence[str]) -> str:
    """The message about a class that is not in the list."""
    return f"class {shown(name)} is not in the class list ({listed(known, 20)}){suggestion(name, known)}"


def class_difference(owner: str, names: Sequence[str], other: str, others: Sequence[str]) -> str:
    """The message about classes that two owners do not share or have in different orders; empty if they agree."""
    texts = []
    for who, own, wanted in ((owner, set(names), others), (other, set(others), names)):
        if missing := [shown(name) for name in wanted if name not in own]:
            texts.append(f"{who} lacks {listed(missing, 5)}")
    if not texts:
        pairs = enumerate(zip(names, others, strict=True))
        texts = [f"label {n} is {shown(a)} and {shown(b)}: the order differs" for n, (a, b) in pairs if a != b][:1]
    return f"{owner} and {other} have different classes: {'; '.join(texts)}" if texts else ""


def check_classes(owner: str, class_names: list[str], dataset: DetectionDataset) -> None:
    """Raise a UserError if a model (`owner`) and a data set have different classes.

    If the model has placeholder names, only the number of classes must agree.
    """
    names = list(dataset.labels.values())
    difference = class_difference(owner, class_names, dataset.source, names)
    if difference and class_names != placeholder_names(len(names)):
        raise UserError(difference)
