from __future__ import annotations

import re

import pytest
from transformers import AutoTokenizer

from bc.data import articles, embedded, text

embedded_suite = pytest.mark.embedded


def doc(title: str, body: str) -> str:
    return f'<doc id="7" url="x?a=1" title="{title}">\n{body}\n</doc>\n'


def test_an_article_is_unescaped_loses_its_repeated_title_and_is_laid_out_as_wikitext() -> None:
    body = "one &lt; two " * 50
    found = articles.articles(doc("Salt &amp; Pepper", f"Salt &amp; Pepper\n\n{body}\n"))
    assert found == [f" = Salt & Pepper = \n\n{('one < two ' * 50).strip()}"]


def test_short_articles_are_dropped_and_the_limit_counts_characters_without_the_title() -> None:
    limit = articles.SHORTEST_ARTICLE
    found = articles.articles(doc("A", "A\n\n" + "x" * (limit - 1)) + doc("B", "y" * limit) + doc("C", "redirect"))
    assert found == [f" = B = \n\n{'y' * limit}"]


def test_text_outside_of_articles_is_no_article() -> None:
    assert articles.articles("x" * 1000) == []


def test_the_calibration_side_is_the_smallest_prefix_with_60_percent_of_the_characters() -> None:
    documents = ["a" * 30, "b" * 30, "c" * 30, "d" * 10]
    assert articles.split(documents).test == documents[2:]
    assert articles.split(["a" * 31, "b" * 28, *documents[2:], "e"]).test == ["d" * 10, "e"]


def test_every_document_is_in_one_part_and_in_order() -> None:
    documents = [f"{i:03}" for i in range(200)]
    parts = articles.split(documents)
    assert sorted(parts.calibration + parts.selection + parts.test) == documents
    assert parts.calibration == sorted(parts.calibration)
    assert parts.selection and parts.selection == sorted(parts.selection)


def test_a_document_that_occurs_twice_is_in_one_part_only() -> None:
    documents = [f"{i:03}" for i in range(100)]
    documents[9] = documents[24] = documents[30] = "one"
    documents[39] = documents[41] = documents[80] = "two"
    parts = articles.split(documents)
    assert parts.calibration.count("one") == 1 and "one" not in parts.selection
    assert parts.test.count("two") == 1 and "two" not in parts.calibration + parts.selection


def test_few_documents_split_without_error() -> None:
    assert articles.split([]) == articles.Split([], [], [])
    assert articles.split(["one"]).calibration == ["one"]


@embedded_suite
def test_the_embedded_wiki_has_the_published_counts() -> None:
    documents = articles.articles(embedded.raw_text("wiki").read_text(encoding="utf8"))
    parts = articles.read("wiki")
    assert len(documents) == 549
    assert len(parts.calibration) + len(parts.selection) == 325
    assert len(parts.test) == 224
    assert len(parts.selection) >= 10


@embedded_suite
def test_the_embedded_c4_has_the_published_counts() -> None:
    parts = articles.read("c4")
    assert len(parts.calibration) + len(parts.selection) == 346
    assert not set(parts.calibration) & set(parts.selection)
    assert len(parts.test) == 238


@embedded_suite
def test_the_embedded_tests_have_the_published_numbers_of_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.language_model("smollm2"))
    count = {
        name: len(tokenizer(articles.SEPARATOR.join(articles.read(name).test), verbose=False).input_ids)
        for name in ("wiki", "c4")
    }
    assert count == {"wiki": 166_419, "c4": 119_432}
    windows = text.test_windows("embedded_wiki", tokenizer, 512)
    assert windows.shape == (325, 512)
    assert text.test_windows("embedded_wiki", tokenizer, 512, limit=16).equal(windows[:16])
    assert text.test_windows("embedded_c4", tokenizer, 2048).shape == (58, 2048)
    assert text.calibration_windows("embedded_wiki", tokenizer, 32, 512, 0).shape == (32, 512)
    assert text.selection_windows("embedded_wiki", tokenizer, 8, 512, 0).shape == (8, 512)
    assert text.selection_windows("embedded_c4", tokenizer, 8, 512, 0).shape == (8, 512)


@embedded_suite
@pytest.mark.parametrize("name", ["wiki", "c4"])
def test_embedded_parts_share_no_document_and_wiki_no_title_or_run_of_13_words_with_the_test(name: str) -> None:
    parts = articles.read(name)
    seen = parts.calibration + parts.selection
    assert not set(seen) & set(parts.test)
    assert not set(parts.calibration) & set(parts.selection)
    if name == "wiki":
        assert not titles(seen) & titles(parts.test)
        assert not titles(parts.calibration) & titles(parts.selection)
        assert not runs(seen) & runs(parts.test)


def titles(documents: list[str]) -> set[str]:
    return {document.split("\n", 1)[0] for document in documents}


def runs(documents: list[str], length: int = 13) -> set[tuple[str, ...]]:
    found = set()
    for document in documents:
        words = re.findall(r"\w+", document.lower())
        found |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return found
