import pytest

from retinanet.data.report import POLICIES, DataError, Report
from retinanet.errors import shown

KINDS = {kind.replace(" ", "_"): kind for kind in POLICIES}  # as keywords


def report_of(**counts):
    report = Report()
    for kind, count in counts.items():
        report.add_rows(KINDS[kind], range(count), lambda row: f"data.csv:{row}", lambda row: f"no {row}")
    return report


def test_at_most_20_examples_of_a_kind_are_listed_but_all_are_counted():
    asked = []
    report = Report()
    report.add_rows("unknown class", range(30), str, lambda row: asked.append(row) or "message")
    report.merge(report_of(unknown_class=5, bad_entry=1000))
    assert report.counts == {"unknown class": 35, "bad entry": 1000} and len(asked) == 20
    text = report.text(report.errors())
    assert "unknown class (fatal): 35" in text and "... and 980 more" in text and len(text.splitlines()) == 44


def test_one_problem_alone_is_one_line():
    assert report_of(spaces=1).text(["spaces"]) == "data.csv:0: no 0"


def test_errors_are_raised_and_strict_makes_all_fatal():
    report = report_of(**{kind.replace(" ", "_"): 1 for kind in POLICIES})
    assert report.errors() == [kind for kind in POLICIES if POLICIES[kind] == "fatal"]
    assert {*report.errors(), *report.warnings()} == {*POLICIES} and len(report.warnings()) > 10
    assert report.errors(strict=True) == [*POLICIES] and report.warnings(strict=True) == []
    warning = report_of(spaces=1)
    warning.raise_errors()
    with pytest.raises(DataError, match="no 0") as error:
        warning.raise_errors(strict=True)
    assert error.value.report is warning


def test_a_kind_of_problem_needs_a_policy():
    with pytest.raises(AssertionError):
        Report().add("no such kind", "x", "y")


def test_messages_that_quote_files_are_short_and_printable():
    for value in ("x" * 10_000, "\ud800", "a\nb", b"\0" * 999, [[["deep"] * 99] * 99] * 99):
        text = shown(value)
        assert len(text) < 1000 and text.isprintable()
        text.encode()


def test_problems_are_grouped_by_cause_with_their_count():
    report = Report()
    names = ["first"] * 30 + ["second"] + ["first"] * 5
    report.add_rows("unknown class", range(36), str, lambda row: f"class {names[row]}", lambda row: names[row])
    other = Report()
    other.add("unknown class", "x", "class second", cause="second", count=2)
    other.add("unknown class", "y", "no cause")
    other.add("unknown class", "z", "no cause")
    report.merge(other)
    assert report.counts == {"unknown class": 40}
    assert report.text(["unknown class"]).split("\n") == [
        "unknown class (fatal): 40",
        "  0: class first (35 times; this is the first)",
        "  30: class second (3 times; this is the first)",
        "  y: no cause",
        "  z: no cause",
    ]


def test_more_causes_than_examples_are_counted_and_messages_are_written_once_a_cause():
    asked = []
    report = Report()
    rows = range(3000)
    report.add_rows("unknown class", rows, str, lambda row: asked.append(row) or "m", lambda row: row % 30)
    assert asked == list(range(20)) and report.counts == {"unknown class": 3000}
    assert report.text(["unknown class"]).split("\n")[-1] == "  ... and 1,000 more"
    report = Report()
    report.add_rows("missing image", range(30), str, lambda row: "m", lambda row: "folder" if row % 2 else None)
    assert [problem.count for problem in report.examples["missing image"]] == [1, 15, *[1] * 14]


def test_skippable_problems_are_all_listed_and_not_fatal():
    report = Report(skip_bad=True)
    report.add_rows("inverted box", range(30), lambda row: f"line {row}", lambda row: f"bad {row}")
    report.add_rows("missing image", range(30, 60), lambda row: f"line {row}", lambda _: "gone", lambda _: "folder")
    report.add("not a number", "line 60", "bad 60")
    report.add("class list", "classes", "no names")
    assert report.errors() == report.errors(strict=True) == ["class list"]
    assert report.skipped == [
        *((f"line {row}", f"bad {row}") for row in range(30)),
        *((f"line {row}", "gone") for row in range(30, 60)),
        ("line 60", "bad 60"),
    ]
    assert report.warnings() == ["not a number", "inverted box", "missing image"]
    assert "missing image (skipped): 30\n  line 30: gone (30 times" in report.text(report.warnings())
    total = Report(skip_bad=True)
    total.merge(report)
    assert total.skipped == report.skipped and total.counts == report.counts
