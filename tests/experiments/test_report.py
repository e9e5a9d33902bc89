"""The report: what it holds, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from experiments import figures, report
from experiments.records import merge, read_rows, rows_of, write_rows
from experiments.store import all_results
from tests.committed import ROOT, committed
from tests.experiments.conftest import Workspace

TINY = "tiny"  # an experiment without a file in conf/experiment


@pytest.fixture(scope="module")
def results(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed rows, and three cells of a tiny model whose folders are there."""
    folder = tmp_path_factory.mktemp("report") / "results"
    workspace = Workspace(shared, folder)
    for bc in ("off", "channel", "sink"):
        assert workspace.run("quantizer=rtn", "bits=w3", f"bc={bc}") == 0
    new = [row for result in all_results(folder) for row in rows_of(result, TINY, "embedded")]
    (folder / "cells.csv").write_bytes(committed("results/cells.csv"))
    write_rows(folder / "cells.csv", merge(read_rows(folder / "cells.csv"), new))
    shutil.copytree(ROOT / "results" / "published", folder / "published")
    assert figures.main(["--results", str(folder)]) == 0
    assert report.main(["--results", str(folder)]) == 0
    return folder


def text_of(results: Path) -> str:
    return (results / "report" / "index.html").read_text("utf8")


def test_nothing_comes_from_elsewhere(results: Path) -> None:
    text = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", text_of(results))
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:|\")", text)
    assert "@import" not in text and "url(" not in text


def test_every_cell_and_experiment_is_there(results: Path) -> None:
    text = text_of(results)
    rows = read_rows(results / "cells.csv")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert set(data["cells"]) == {row["cell"] for row in rows}
    assert set(data["details"]) == {row["cell"] for row in rows if row["experiment"] == TINY}
    squeezed = re.sub(r">\s+", ">", re.sub(r"\s+<", "<", text))
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        assert f"<td>{path.stem}</td>" in squeezed
        missing = f"not run yet: python -m experiments.run +experiment={path.stem}</td>" in squeezed
        assert missing != any(row["experiment"] == path.stem for row in rows)


def test_the_same_rows_give_the_same_page(results: Path) -> None:
    first = text_of(results)
    assert report.main(["--results", str(results)]) == 0
    assert text_of(results) == first


def test_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "has no rows" in capsys.readouterr().err


# In a browser ---------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """A page, and what it complained of or asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        if program is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any, results: Path) -> Iterator[Visit]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    seen = Visit(page)
    page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto((results / "report" / "index.html").as_uri())
    yield seen
    assert not seen.errors
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_sort(visit: Visit) -> None:
    table = visit.page.locator("#table2_embedded [data-table]")
    head = table.locator("th", has_text="value")
    head = table.locator("th").filter(has=visit.page.get_by_role("button", name="value", exact=True))
    number = head.evaluate("th => th.cellIndex")
    values = f"rows => rows.map(row => Number(row.cells[{number}].dataset.key))"
    button = head.locator("button")
    button.focus()
    visit.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    rising = table.locator("tbody tr").evaluate_all(values)
    assert rising == sorted(rising) and len(rising) > 30
    visit.page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    assert table.locator("tbody tr").evaluate_all(values) == rising[::-1]


def test_filter(visit: Visit) -> None:
    table = visit.page.locator("#table2_embedded [data-table]")
    count = table.locator("tbody tr").count()
    table.get_by_label("Filter").fill("gptq w3g64 sink")
    assert table.locator("tbody tr:visible").count() == 2
    assert table.get_by_role("status").text_content() == f"2 of {count} rows"
    table.get_by_label("dataset").select_option("embedded_wiki")
    assert table.locator("tbody tr:visible").count() == 1
    table.get_by_label("Filter").fill("")
    table.get_by_label("dataset").select_option("all")
    assert table.locator("tbody tr:visible").count() == count


def test_open_a_cell_by_keyboard(visit: Visit) -> None:
    link = visit.page.locator("#table2_embedded td a").first
    link.focus()
    visit.page.keyboard.press("Enter")
    dialog = visit.page.get_by_role("dialog")
    dialog.wait_for()
    assert "smollm2_135m" in dialog.locator("h2").text_content()
    assert "row of cells.csv is all that is shown" in dialog.text_content()
    visit.page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert link.evaluate("link => document.activeElement === link")


def test_a_cell_with_its_sites(visit: Visit, results: Path) -> None:
    visit.page.locator(f"#{TINY} tr", has_text="sink").locator("a").click()
    dialog = visit.page.get_by_role("dialog")
    dialog.wait_for()
    sites = json.loads(next((results / "cells").glob("*-sink-*/sites.json")).read_text())
    assert dialog.locator("tbody tr").count() == len(sites)
    assert dialog.locator("svg circle").count() > 0
    assert '"granularity": "sink"' in dialog.locator("pre").first.text_content()
    before = dialog.locator("th", has_text="held out relative before").locator("button")
    before.click()
    assert dialog.locator("th[aria-sort]").count() == 1


def test_link_to_a_cell(browser: Any, results: Path) -> None:
    cell = read_rows(results / "cells.csv")[0]["cell"]
    page = browser.new_page()
    page.goto((results / "report" / "index.html").as_uri() + f"#cell-{cell}")
    assert cell in page.get_by_role("dialog").text_content()
    page.close()


def test_light_dark_and_print(visit: Visit) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = visit.page.evaluate(colour)
    visit.page.get_by_role("button", name="Dark").click()
    dark = visit.page.evaluate(colour)
    assert dark != light
    visit.page.emulate_media(media="print")
    assert visit.page.evaluate(colour) == light == "rgb(255, 255, 255)"
    assert not visit.page.locator(".tools").first.is_visible()
    visit.page.emulate_media(media="screen", color_scheme="dark")
    visit.page.reload()
    assert visit.page.evaluate(colour) == dark


def test_narrow_screens_do_not_scroll_sideways(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 390, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
