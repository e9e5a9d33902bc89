"""What the README shows is what the committed results hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", ["table2_embedded", "table4_embedded", "granularity_vision"])
def test_the_results_tables_are_the_committed_ones(name: str) -> None:
    shown = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text("utf8"), re.DOTALL)
    assert shown is not None
    made = (ROOT / "results" / "tables" / f"{name}.md").read_text("utf8")
    assert table_lines(shown[1]) == table_lines(made)


@pytest.mark.parametrize("name", ["table1_embedded", "table3_embedded"])
def test_the_excerpt_of_a_table_is_of_the_committed_one(name: str) -> None:
    shown = re.search(rf"<!-- {name}, .*? -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text("utf8"), re.DOTALL)
    assert shown is not None
    made = table_lines((ROOT / "results" / "tables" / f"{name}.md").read_text("utf8"))
    assert len(table_lines(shown[1])) > 2 and table_lines(shown[1]) == [x for x in made if x in table_lines(shown[1])]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    source = ROOT / page
    targets = re.findall(r"\]\(([^)#]+)\)", source.read_text("utf8"))
    targets += re.findall(r'src="([^"]+)"', source.read_text("utf8"))
    for target in targets:
        if not target.startswith("http"):
            assert (source.parent / target).exists(), target


def test_make_targets_that_are_named_exist() -> None:
    verbs = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE))
    text = "\n".join((ROOT / page).read_text("utf8") for page in PAGES)
    assert set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE)) <= verbs


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "faults.md").read_text("utf8"))
    assert len(named) > 20
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in path.read_text("utf8"), f"{file}::{test}"
