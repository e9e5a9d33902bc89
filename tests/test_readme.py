"""What the README shows is what the committed results hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", ["table2_embedded", "table3_embedded", "table4_embedded"])
def test_the_results_tables_are_the_committed_ones(name: str) -> None:
    shown = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text("utf8"), re.DOTALL)
    assert shown is not None
    made = (ROOT / "results" / "tables" / f"{name}.md").read_text("utf8")
    assert table_lines(shown[1]) == table_lines(made)


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/method.md"])
def test_links_lead_somewhere(page: str) -> None:
    source = ROOT / page
    targets = re.findall(r"\]\(([^)#]+)\)", source.read_text("utf8"))
    targets += re.findall(r'src="([^"]+)"', source.read_text("utf8"))
    for target in targets:
        if not target.startswith("http"):
            assert (source.parent / target).exists(), target


def test_make_targets_that_are_named_exist() -> None:
    verbs = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", (ROOT / "README.md").read_text("utf8")))
    assert named <= verbs
