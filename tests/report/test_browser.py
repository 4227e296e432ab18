"""The page in a real headless Chromium: phone, desktop, light, dark, hostile texts, 100,000 rollouts."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfemo_jax.report import write_report
from selfemo_jax.reporting.rollouts import step_files
from tests.report.folders import HOSTILE, NOTE, write, write_changes, write_clusters, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: install Debian's package chromium")
MOST_MS = 300
SEARCH = """async (query) => {
  const input = document.getElementById("search"), count = document.getElementById("count");
  const start = performance.now();
  const changed = new Promise((done) => new MutationObserver(done).observe(count, { childList: true }));
  input.value = query;
  input.dispatchEvent(new Event("input"));
  await changed;
  return [performance.now() - start, count.textContent];
}"""
"""Type a query; milliseconds until the page tells the number of rows, and what it tells."""
LONG_TASKS = """window.longTasks = [];
new PerformanceObserver((list) => window.longTasks.push(...list.getEntries().map((one) => one.duration)))
  .observe({ type: "longtask", buffered: true });"""
"""Keeps the milliseconds for which the page could not answer."""


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright, of the extra test")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    name = HOSTILE.replace("/", "")[:60]
    folder = write_run(tmp_path_factory.mktemp("one") / name, steps=40, text=HOSTILE)
    write_clusters(folder, HOSTILE)
    write_changes(folder)
    return write_report([folder])


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    runs = [write_run(folder / "plumbing"), write_run(folder / "real", note="", seed=1, right=(1, 1, 1, 1))]
    return write_report(runs)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """100 steps of 1,000 rollouts: ten that differ in words, each written ten times with its own step."""
    folder = write_run(tmp_path_factory.mktemp("large") / "run", steps=10, prompts=125, group_size=8)
    texts = [path.read_text() for path in step_files(folder)]
    for step in range(12, 102):
        old = 2 + (step - 2) % 10
        text = (
            texts[old - 2].replace(f'"step": {old},', f'"step": {step},').replace(f" n{old}x", f" n{step}x")
        )
        write(folder / "rollouts" / f"step_{step:06d}.jsonl", text)
    return write_report([folder])


@contextmanager
def opened(chromium, path: Path, *, width: int = 1440, scheme: str = "light") -> Iterator:
    """The page when all is decoded; fails on any message of the console or request to anywhere else."""
    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, heard = context.new_page(), []
    page.add_init_script(LONG_TASKS)
    page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("request", lambda request: heard.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]", state="attached", timeout=60_000)
    yield page
    context.close()
    assert [words for words in heard if not words.startswith("blob:")] == []


def unfold(page) -> None:
    """Open every fold and pass every part of the page, so that what is built on sight is built."""
    page.evaluate("() => document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for place in range(0, page.evaluate("() => document.documentElement.scrollHeight"), 600):
        page.evaluate("(place) => scrollTo(0, place)", place)
        page.wait_for_timeout(30)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("which", ["one", "two"])
def test_the_page_fits_its_screen_and_complains_of_nothing(chromium, request, which, width, scheme):
    with opened(chromium, request.getfixturevalue(which), width=width, scheme=scheme) as page:
        unfold(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        assert page.locator(".chart canvas").count() == page.locator(".chart").count() > 10
        dark = page.evaluate(
            "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert (sum(dark) < 200) == (scheme == "dark")


def test_a_confusion_that_grew_raises_an_alarm_on_the_page(chromium, one):
    with opened(chromium, one) as page:
        changes = page.locator("#changes")
        assert changes.locator(".banner").inner_text() == "Alarm: tiny: anger read as joy 2 → 9"
        grown, fallen = (
            changes.locator(f"td[title^='gold anger, predicted {label}']") for label in ("joy", "anger")
        )
        assert (grown.inner_text(), fallen.inner_text()) == ("+7", "−7")
        assert grown.get_attribute("title").endswith("2 before, 9 after")
        assert "--bad" in grown.get_attribute("style") and "--bad" in fallen.get_attribute("style")
        right = changes.locator("td[title^='gold joy, predicted joy']")
        assert right.inner_text() == "+1" and "--good" in right.get_attribute("style")
        assert changes.locator("select[name=change]").input_value() == "cold to rl_1"


@pytest.mark.parametrize("width", [390, 1440])
def test_counts_of_four_digits_fit_into_the_cells_of_confusions(chromium, one, width):
    with opened(chromium, one, width=width) as page:
        # Seven labels, as MELD has, in the width that the page gives a table of them.
        too_wide = page.evaluate("""() => {
          const [head, row] = document.querySelectorAll(".confusion tr");
          while (head.children.length < 10) head.append(head.lastChild.cloneNode(true));
          while (row.children.length < 10) row.append(row.lastChild.cloneNode(true));
          const shown = [...row.querySelectorAll("td")];
          shown.forEach((cell) => { cell.textContent = "1073"; cell.style.fontWeight = 700; });
          return [shown.length, shown.filter((cell) => cell.scrollWidth > cell.clientWidth).length];
        }""")
        assert too_wide == [9, 0]


def test_hostile_texts_are_shown_as_text(chromium, one):
    with opened(chromium, one) as page:
        unfold(page)
        page.locator(".row").first.click()
        shown = page.locator("dialog pre").first.inner_text()
        assert HOSTILE.replace("\u2028", "") in shown.replace("\u2028", "")
        assert page.locator(".talk", has_text="onerror").count() >= 2, "in the dialogue and in self-play"
        assert "onerror" in page.locator("svg.map circle title").first.text_content()
        assert page.locator("figcaption, .u-legend", has_text="onerror").count() > 2, (
            "metric, name of the run"
        )
        assert page.locator("img, main b b, pre *").count() == 0
        assert page.evaluate("() => window.broken") is None


def test_every_block_of_numbers_carries_the_words_of_a_plumbing_run(chromium, one):
    with opened(chromium, one) as page:
        unfold(page)
        page.locator(".row").first.click()
        figures = page.locator("figure.panel, dialog, header")
        assert figures.count() > 15
        assert [text for text in figures.all_inner_texts() if NOTE not in text and "object" not in text] == []


def test_only_the_run_that_is_plumbing_is_called_so(chromium, two):
    with opened(chromium, two) as page:
        rows = page.locator("#scores tbody tr").all_inner_texts()
        assert [NOTE in row for row in rows if row.split()[0] in ("plumbing", "real")] == [True, False] * 3
        yardsticks = page.locator("#scores figure", has_text="Beside yardsticks").locator("tbody tr")
        # A quarter is wrong: F1 of joy 1, of anger 2/3. Then majority, a stratified draw, the linear model.
        cells = yardsticks.first.locator("td").all_inner_texts()
        assert [cell.strip() for cell in cells[-5:-1]] == [
            "83.3 / 75.0",
            "33.3 / 50.0",
            "45.0 / 50.0",
            "55.0 / 50.0",
        ]
        row = page.locator("#significance tbody tr").first.inner_text()
        assert row.startswith("real") and "1 / 0" in row
        # Two dialogues: neither an interval nor a p, and the page says why.
        assert "- (-)" in row and "fewer than 10" in page.locator("#significance").inner_text()


def test_100000_rollouts_are_filtered_below_300_ms(chromium, large):
    """From the keystroke to the rows on the page, the slowest of several searches."""
    with opened(chromium, large) as page:
        assert "100,000 of 100,000" in page.locator("#count").inner_text()
        assert page.locator(".row").count() < 40, "only what is seen is in the page"
        assert max(page.evaluate("() => window.longTasks"), default=0) < 1000, "frozen while it was read"
        took = []
        for query, expected in (("marble", None), ("n57x101x3", 1), ("no such words", 0), ("N57X10", 88)):
            # The faster of two: the machine may take the processor away in one of them.
            first, second = [page.evaluate(SEARCH, wanted) for wanted in ("", query, "", query)][1::2]
            ms, text = min(first, second)
            found = int(re.match(r"[\d,]+", text).group().replace(",", ""))
            assert found == expected if expected is not None else 0 < found < 100_000, text
            took.append(ms)
        assert max(took) < MOST_MS, f"milliseconds of each search: {took}"


def test_filters_narrow_and_order(chromium, large):
    from playwright.sync_api import expect

    with opened(chromium, large) as page:
        page.select_option("select[name=answer]", "malformed")
        expect(page.locator("#count")).to_have_text(re.compile("^12,500 "))
        assert "E_PAIR" in page.locator(".row").first.inner_text()
        # Of 1,000 answers of a step 500 name the gold label, of them 63 outside the grammar: those are wrong.
        page.select_option("select[name=answer]", "right")
        expect(page.locator("#count")).to_have_text(re.compile("^43,700 "))
        page.select_option("select[name=answer]", "wrong")
        expect(page.locator("#count")).to_have_text(re.compile("^56,300 "))
        page.select_option("select[name=answer]", "disagree")
        page.select_option("select[name=order]", "best R")
        expect(page.locator(".row").first).to_have_text(re.compile(r"^R 7\.50"))
        page.locator(".list").evaluate("(list) => { list.scrollTop = list.scrollHeight; }")
        expect(page.locator(".row").last).to_have_text(re.compile(r"^R 0\.50"))


def test_a_row_opens_its_whole_group_on_a_phone(chromium, two):
    with opened(chromium, two, width=390) as page:
        page.locator(".row").first.click()
        assert page.locator("dialog .answer").count() == 3
        assert page.locator("dialog .answer.chosen").count() == 1
        box = page.locator("dialog").bounding_box()
        assert (
            box["width"] <= 390 and page.evaluate("() => document.querySelector('dialog').scrollWidth") <= 390
        )
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0
