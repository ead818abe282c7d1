"""report.html in a real browser: Debian's Chromium, if it is installed, driven by Playwright."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import detections, gradient, save

from retinanet.data.dataset import DetectionDataset
from retinanet.evaluation import report, web_report

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: report.html is not tested")
NONE = "\N{EN DASH}"
NAMES = ["<script>alert(1)</script>", "$x_$", "\u05e9\u05dc\u05d5\u05dd \u6c7d\u8f66 " + 300 * "a"]


def is_missing(request):
    return request.failure != "net::ERR_ABORTED"  # a drawing was replaced before its image was loaded


@pytest.fixture(scope="module")
def tab():
    """One browser tab for all tests, because opening one takes long, and the list of its errors."""
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page, problems = browser.new_page(), []
        page.set_default_timeout(120_000)  # for busy machines
        expect.set_options(timeout=120_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or problems.append(request.url))
        page.on("requestfailed", lambda request: is_missing(request) and problems.append(f"failed: {request.url}"))
        yield page, problems
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of 12 images, some with names that a page could take for code, and metrics.json beside it."""
    folder, rng, rows, found = tmp_path_factory.mktemp("report"), np.random.default_rng(0), [], {}
    files = [str(folder / f"{number} \"'#?&<b>.png") for number in range(12)]
    for image, file in enumerate(files):
        save(gradient(60, 80), file)
        boxes = np.hstack([rng.uniform(0, 40, (4, 2)), np.zeros((4, 2)), rng.integers(0, 3, (4, 1))])
        boxes[:, 2:4] = boxes[:, :2] + 15
        rows.append(boxes)
        noise = np.hstack([rng.normal(0, 2.5, (8, 4)), np.zeros((8, 1))])
        moved = np.vstack([boxes, boxes]) + noise
        moved[::3, 4] = rng.integers(0, 3, len(moved[::3]))
        scores = np.sort(rng.random(8))[::-1]
        found[image] = detections(*([score, row[4], *row[:4]] for score, row in zip(scores, moved, strict=True)))
    dataset = DetectionDataset(files, np.concatenate(rows), np.repeat(np.arange(12), 4), NAMES)
    evaluation = report.Evaluation(dataset, found, analyse=True)
    evaluation.write(folder)
    log = [{"epoch": epoch, "class_loss": 1 / (1 + epoch), "box_loss": 0.5, "AP": 0.1 * epoch} for epoch in range(4)]
    web_report.write(folder / "report.html", evaluation, "model.pt", True, log)
    return folder


@pytest.fixture
def page(tab, folder):
    """The page, opened from its file; any error in it, and any request to a server, fails the test."""
    page, problems = tab
    problems.clear()
    page.set_viewport_size({"width": 1100, "height": 800})
    page.goto((folder / "report.html").as_uri())
    yield page
    assert problems == []


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def texts(page, selector):
    return page.eval_on_selector_all(selector, "nodes => nodes.map(node => node.textContent.trim())")


def shown(value):
    return NONE if value in (None, -1) else f"{value + 1e-12:.3f}"  # halves are rounded up


def data_of(page):
    return page.evaluate("data")


def test_every_step_shows_the_numbers_of_metrics_json(page, folder):
    content, steps = metrics(folder), data_of(page)["steps"]
    # All rows at all steps at once: a call into the browser takes long.
    rows = page.evaluate("""() => data.steps.map((_, step) => {
        moveTo(step);
        return [...document.querySelectorAll("tr[data-row]")].filter((row) => row.id !== "now-class")
            .map((row) => [+row.dataset.row, ...[...row.querySelectorAll(".now")].map((cell) => cell.textContent)]);
    })""")
    assert len(rows) == len(steps) > 100
    for row, one in [*enumerate(content["classes"]), (3, content)]:
        for place, score in enumerate(one["above"]["score"]):
            wanted = [shown(one["above"][name][place]) for name in ("precision", "recall", "f1")]
            got = next(cells for cells in rows[steps.index(score)] if cells[0] == row)
            assert got[1:4] == wanted
        point = one["best_f1"]
        got = next(cells for cells in rows[steps.index(point["score"])] if cells[0] == row)
        assert got[1:] == [*(shown(point[name]) for name in ("precision", "recall", "f1")),
                           *(str(point[name]) for name in ("right", "false", "missed"))]  # fmt: skip
    assert texts(page, ".tiles dd") == [shown(content[name]) for name in texts(page, ".tiles dt")]


def test_the_slider_by_keyboard_moves_numbers_boxes_and_flag(page):
    start, best = data_of(page)["start"], data_of(page)["best"][-1]
    assert start == best and page.input_value("#slider") == str(best)
    page.focus("#slider")
    page.keyboard.press("End")
    assert texts(page, "#now tbody tr:first-child td") == [NONE, "0.000", "0.000", "0", "0", "48"]
    page.select_option("#kind", "false")
    expect(page.locator("#cards li")).to_have_count(0)
    page.keyboard.press("Tab")
    page.focus("#slider")
    page.keyboard.press("Home")
    expect(page.locator("#cards li")).not_to_have_count(0)
    low = page.eval_on_selector_all("#cards .found-false, #cards .found-right", "nodes => nodes.length")
    page.keyboard.press("PageUp")
    expect(page.locator("#cards .found-false, #cards .found-right")).not_to_have_count(low)
    score = page.text_content("#score")
    assert page.text_content("#flag") == f"--score_threshold {score}"
    assert page.get_attribute("#slider", "aria-valuetext") == score
    expect(page.locator("#status")).to_contain_text(f"Scores above {score}: precision")  # once it rests
    page.click("#copy")
    assert page.text_content("#copied") == "copied"
    page.click("#best-all")
    assert page.input_value("#slider") == str(best)


def test_headings_sort(page, folder):
    content = metrics(folder)["classes"]
    by_ap = [one["name"] for one in sorted(content, key=lambda one: one["AP"])]
    assert texts(page, "#class-table tbody th") == by_ap  # the worst first
    page.focus("#class-table thead th:nth-child(2) button")
    page.keyboard.press("Enter")
    assert texts(page, "#class-table tbody th") == by_ap[::-1]
    assert page.get_attribute("#class-table thead th:nth-child(2)", "aria-sort") == "descending"
    page.click("#class-table thead th:nth-child(7) button")
    boxes = texts(page, "#class-table tbody td:nth-child(7)")
    assert boxes == sorted(boxes, key=int) and page.locator("th[aria-sort]").count() == 1


def test_a_class_filters_and_its_name_stays_text(page):
    page.select_option("#kind", "missing")
    all_cases = page.text_content("#shown")
    page.click(".name[data-label='0']")
    assert page.text_content("#now-class bdi") == NAMES[0] and page.is_visible("#now-class")
    expect(page.locator("#shown")).not_to_have_text(all_cases)
    assert page.input_value("#class") == "0" and page.locator("#pr .strong").get_attribute("data-row") == "0"
    assert all(name.startswith(NAMES[0]) for name in texts(page, "#cards .what"))
    page.click("#best-class")
    assert page.input_value("#slider") == str(data_of(page)["best"][0])
    page.click("#clear")
    assert page.is_hidden("#now-class")
    page.click("#legend [data-label='1']")
    assert page.text_content("#now-class bdi") == NAMES[1]
    assert set(texts(page, "#class-table tbody bdi")) == set(texts(page, "#class option")[1:]) == set(NAMES)


def test_kinds_of_errors_and_confusions_show_their_cases(page, folder):
    content = metrics(folder)
    for kind, count in content["errors"]["counts"].items():
        page.click(f"[data-kind={kind}]")
        expect(page.locator("#shown")).to_contain_text(re.compile(rf"^{count} case"))
    for button in page.query_selector_all("[data-cell]")[:4]:
        true, detected = map(int, button.get_attribute("data-cell").split())
        button.click()
        count = content["confusion"][true][detected]
        assert page.text_content("#shown").split()[0] == str(count) == button.text_content()
    page.select_option("#kind", "label")
    assert page.input_value("#kind") == "label" and page.is_hidden("#cell")


def test_the_whole_image_by_keyboard(page):
    page.select_option("#kind", "missing")
    page.focus("#cards button")
    page.keyboard.press("Enter")
    assert page.is_visible("#whole") and page.locator("#whole-image image").count() == 1
    assert "\"'#?&<b>.png" in page.text_content("#whole-text")
    first = page.text_content("#whole-text")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#whole-text") != first and page.text_content("#whole-text").startswith("2 of")
    assert page.locator("#boxes tbody tr").count() > 4
    page.keyboard.press("Escape")
    assert page.is_hidden("#whole")
    expect(page.locator("[data-case='1']")).to_be_focused()  # at the dialog's close event, which comes later
    page.keyboard.press("Enter")
    page.focus("#slider-2")
    page.keyboard.press("PageUp")
    page.keyboard.press("Escape")
    expect(page.locator("[data-case='1']")).to_be_focused()
    page.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert page.evaluate("document.activeElement.dataset.case") == "1"  # nothing is drawn after that


def test_the_page_fits_and_every_control_has_a_name(page):
    for width in (1100, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    unnamed = """nodes => nodes.filter(node => !(node.textContent.trim() || node.ariaLabel || node.labels?.length
        || node.caption || node.hidden || node.getAttribute("aria-labelledby"))).length"""
    assert page.eval_on_selector_all("button, select, input, table, svg[role]", unnamed) == 0
    broken = "nodes => nodes.filter(node => node.getBBox().width === 0).length"
    assert page.eval_on_selector_all("#cards image, #pr polyline", broken) == 0


def test_a_dark_edge_surrounds_every_box_and_the_one_in_question_is_wider(page):
    page.select_option("#kind", "missing")

    def width(style):
        selector = f"#cards rect{style}"
        return float(page.eval_on_selector(selector, "node => getComputedStyle(node).strokeWidth").removesuffix("px"))

    others = [width(f".{style}:not(.focus)") for style in ("truth", "found-right", "found-false")]
    assert width(".edge:not(.focus)") > max(others) and width(".edge.focus") > width(".lost.focus") > max(others)
