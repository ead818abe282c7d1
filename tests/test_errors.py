import pytest

from retinanet.errors import escaped, listed, printable, shortened, shown, suggestion


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("car", "car"),
        ("汽车 Ünï क्‍ष", "汽车 Ünï क्‍ष"),
        ("car\x1b[31m\nred", r"car\x1b[31m\nred"),
        ("a\rb\tc\x07\x9b\x7f", r"a\rb\tc\x07\x9b\x7f"),
        ("\x85\u2028\u2029\x0b\x0c", r"\x85\u2028\u2029\x0b\x0c"),
        ("cut \ud83d", r"cut \ud83d"),
        ("\u202egnp.exe \u2066x\u200b", r"\u202egnp.exe \u2066x\u200b"),  # drawn from right to left, or not at all
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_escaped(text, expected):
    assert escaped(text) == expected
    assert printable(f"one\n{text.replace(chr(10), '')}\n") == f"one\n{expected.replace(chr(92) + 'n', '')}\n"


def test_quoted_values_are_escaped_and_cut():
    assert shown("a\x1b") == r"'a\x1b'"
    assert len(shown("x" * 1000)) <= 300 and len(shown([["y" * 500] * 500] * 500)) <= 300


def test_names_in_a_column_are_cut():
    assert shortened("a" * 40) == "a" * 40 and shortened("b" * 41) == "b" * 39 + "\N{HORIZONTAL ELLIPSIS}"
    assert shortened("a\x1b") == r"a\x1b"


def test_the_nearest_word_is_suggested():
    assert suggestion("Cra ", ["car", "bus"]) == "; did you mean 'car'?"
    assert suggestion("zebra", ["car", "bus"]) == ""


def test_a_long_list_is_cut():
    assert listed(["a", "b"], 2) == "a, b" and listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listed(["a"] * 2000, 1) == "a and 1,999 more"
