"""What the folder layouts of all formats share: names of sets, and the split of a folder that has no sets."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from retinanet.data.report import Report, counted
from retinanet.errors import UserError, shown

# Different names of the same set. COCO's, of 2017, are the defaults of --coco_train_set and --coco_val_set.
SAME_NAMES = (("train", "train2017", "training"), ("val", "val2017", "valid", "validation"))
# The flags that read files with a suffix.
READERS = {
    ".json": "--dataset coco --coco_path IMAGES --coco_train_set FILE.json",
    ".xml": "--dataset voc --voc_path FOLDER",
    ".txt": "--dataset yolo --yolo_path FOLDER",
    ".csv": "--dataset csv --csv_train FILE.csv",
}
ALL = "all"  # the set of all images in a folder without sets

Source = TypeVar("Source")


def any_case(pattern: str) -> str:
    """A pattern for `glob` that ignores letter case."""
    return re.sub("[A-Za-z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)


def find_places(root: Path, patterns: Iterable[str]) -> Iterator[tuple[str, str, Path]]:
    """The pattern, what `{}` stands for, and path, of all that matches patterns such as `images/{}` in any case."""
    for pattern in patterns:
        before, after = pattern.split("{}")
        for path in sorted(root.glob(any_case(f"{before}*{after}"))):
            name = path.relative_to(root).as_posix()
            yield pattern, name[len(before) : len(name) - len(after)], path


def find_set(root: Path, set_name: str, sets: Mapping[str, Source], val_share: float | None = None) -> Source:
    """The set with a name, or else the only one with an equivalent name, such as `valid` for `val`."""
    listed = ", ".join(map(shown, sorted(sets)[:20]))
    if val_share is not None:
        raise UserError(f"{root}: has the sets {listed}, but --val_share is for folders without sets")
    if set_name in sets:
        return sets[set_name]
    alike = [name for names in SAME_NAMES if set_name in names for name in names if name in sets]
    if len(alike) != 1:
        raise UserError(f"{root}: has no set named {shown(set_name)}; its sets are: {listed}")
    return sets[alike[0]]


def refused(root: Path, wanted: str) -> UserError:
    """The error about a folder in none of a format's layouts: what it holds instead, and which flags read that."""
    if not root.is_dir():
        return UserError(f"{root}: is not a folder")
    files = itertools.islice((path for path in root.rglob("*") if path.is_file()), 10_000)
    counts = Counter(path.suffix.lower() for path in files)
    found = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5)) or "no files"
    flags = [flags for suffix, flags in READERS.items() if suffix in counts]
    hint = f"; such files are read with {' or '.join(flags)}" if flags else ""
    return UserError(f"{root}: has no {wanted}, but {found}{hint}")


def choose_share(
    root: Path, set_name: str, val_share: float | None, files: Mapping[Path, Source]
) -> Mapping[Path, Source]:
    """Choose the images of a set, with their files, in a folder without sets.

    The share for validation (None: all images are for training) is chosen by a hash of the names, so it is always the
    same.
    """
    is_train, is_val = (set_name in same for same in SAME_NAMES)
    if set_name == ALL or (is_train and val_share is None):
        return files
    if val_share is None or not (is_train or is_val):
        raise UserError(
            f"{root}: has no set named {shown(set_name)}: its {len(files):,} images are not divided into sets, and all "
            f"are for training; use --val_share 0.2 to validate on a fifth of them, or the set `{ALL}` for all of them"
        )
    number = min(max(round(val_share * len(files)), 1), len(files) - 1)
    if number < 1:
        raise UserError(f"{root}: --val_share cannot split {counted(len(files), 'image')}")

    def digest(path: Path) -> bytes:
        name = path.relative_to(root).as_posix().encode(errors="surrogatepass")
        return hashlib.blake2b(name, person=b"val_share").digest()

    chosen = set(sorted(files, key=digest)[:number])
    return {path: file for path, file in files.items() if (path in chosen) == is_val}


def report_list(source: Path, folder: Path, lines: Sequence[str], found: Sequence[Path | None], report: Report) -> None:
    """Report the lines of a list whose images do not exist (None in `found`), or are repeated."""
    cause = None if any(found) else folder
    seen: set[Path | None] = set()
    for line, image in zip(lines, found, strict=True):
        if image is None:
            report.add("missing image", str(source), f"image {shown(line)} does not exist in {folder}", cause)
        elif image in seen:
            report.add("repeated image", str(source), f"{shown(line)} is repeated, and read once")
        seen.add(image)
