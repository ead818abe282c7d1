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


def test_messages_from_files_are_short_and_printable():
    for value in ("x" * 10_000, "\ud800", "a\nb", b"\0" * 999, [[["deep"] * 99] * 99] * 99):
        text = shown(value)
        assert len(text) < 1000 and text.isprintable()
        text.encode()
