import warnings

import numpy as np
import pytest

from retinanet.visual import text
from retinanet.visual.drawing import draw_boxes


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ("red car", "red car"),
        ("a\nb\tc\u2028d\x0be", "a b c d e"),
        ("car\x1b[31m", "car [31m"),
        ("car \ud83d", "car"),  # half a surrogate pair
        ("\u202efdp.exe", "fdp.exe"),  # right-to-left override
        ("_front $x_$", "_front $x_$"),
    ],
)
def test_text_from_files_becomes_one_harmless_line(raw, line):
    assert text.one_line(raw) == line


def test_long_names_end_in_an_ellipsis():
    assert text.one_line("a" * 30, limit=10) == "a" * 9 + "…"
    assert text.one_line("a" * 10, limit=10) == "a" * 10
    assert [len(name) for name in text.readable_names(["a" * 5000, "b"])] == [text.NAME_LIMIT, 1]


@pytest.fixture
def no_fonts(monkeypatch):
    """A machine on which only Pillow's own font exists."""
    monkeypatch.setattr(text, "FONT_FOLDERS", ())
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda _: None)
    caches = (text.font_with, text.installed_fonts, text._warn_of_fonts)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_fonts_letters_become_ascii_or_the_label(no_fonts, monkeypatch):
    warned = []
    monkeypatch.setattr(text.log, "warning", warned.append)
    names = ["Zürich", "汽车", "a very long class name that never ends", "", "Hund"]
    assert text.readable_names(names) == ["Zurich", "class 1", "a very long class name…", "class 3", "Hund"]
    assert text.drawable("汽车 é 0.93") == "?? e 0.93"
    assert len(warned) == 1 and "apt install" in warned[0]  # once


def test_a_font_is_found_that_has_the_letters():
    pytest.importorskip("matplotlib")  # brings a font that has them
    assert text.find_font("cat") == "" and text.find_font("Жук").endswith(".ttf")
    ground = np.full((400, 400, 3), 90, dtype=np.uint8)
    drawn = {letter: draw_boxes(ground, [[50, 50, 350, 350]], [0], [letter]).tobytes() for letter in "äñØЖ"}
    assert len(set(drawn.values())) == 4


@pytest.mark.parametrize("name", ["汽车", "हिन्दी", "😀", "\U0010ffff", "\x00", "$x_$", "_front", "ж" * 500])
def test_any_name_can_be_drawn_and_charted_without_a_warning(name, tmp_path):
    charts = pytest.importorskip("retinanet.visual.charts")
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_boxes(np.zeros((330, 330, 3), np.uint8), [[50, 50, 350, 350]], [0], text.readable_names([name]))
        charts.draw_curves({"IoU 0.5": {name: np.array([[0, 1], [1, 0.5]])}}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()
