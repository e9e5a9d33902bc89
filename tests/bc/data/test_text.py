from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bc.data import articles, text
from bc.errors import UserError
from tests.bc.data.conftest import LETTERS, Encode

WIKITEXT = {
    "train": ["", " = one = \n", "", " aa bb cc dd ee ff gg hh . \n", " ii jj kk ll mm nn oo pp . \n"],
    "validation": ["", " = two = \n", "", " qq rr ss tt uu vv ww xx yy zz . \n"],
    "test": ["", " = three = \n", "", " abc def ghi jkl mno pqr stu vwx yz . \n"],
}
PTB = {
    "train": [LETTERS[i] * 12 for i in range(40)],
    "validation": ["no it was n't <unk>", "the end of it"],
    "test": ["a test of the thing", "and more of it"],
}
#: Two documents in three are long enough for a window of 8.
C4 = {
    "train": [LETTERS[i] * (4 if i % 3 == 0 else 8 + i % 7) for i in range(60)],
    "validation": [LETTERS[100 + i] * (3 if i % 4 == 0 else 8 + i % 5) for i in range(50)],
}


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    for name, splits in (("wikitext2", WIKITEXT), ("ptb", PTB), ("c4", C4)):
        (tmp_path / name).mkdir()
        for split, rows in splits.items():
            lines = [json.dumps({"text": row, "url": "x"}) for row in rows]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf8")
    return {name: tmp_path / name for name in ("wikitext2", "ptb", "c4")}


def published_draws(documents: list[str], samples: int, window: int, seed: int) -> list[tuple[int, int]]:
    """(document, start) as the published code draws them, a token a character."""
    random.seed(seed)
    drawn = []
    for _ in range(samples):
        while True:
            index = random.randint(0, len(documents) - 1)
            if len(documents[index]) > window:
                break
        drawn.append((index, random.randint(0, len(documents[index]) - window - 1)))
    return drawn


@pytest.mark.parametrize(
    ("dataset", "joined"),
    [
        ("wikitext2", "\n\n".join(WIKITEXT["test"])),
        ("ptb", "\n\n".join(PTB["validation"])),
        ("ptb_new", " ".join(PTB["test"])),
        ("c4_new", " ".join(C4["validation"])),
    ],
)
def test_a_test_text_is_one_encoding_cut_into_windows(
    dataset: str, joined: str, tokenizer: PreTrainedTokenizerFast, encode: Encode, paths: dict[str, Path]
) -> None:
    windows = text.test_windows(dataset, tokenizer, 7, paths=paths)
    count = len(joined) // 7
    assert windows.dtype == torch.int64
    assert windows.equal(encode(joined)[: 7 * count].view(count, 7))
    assert text.test_windows(dataset, tokenizer, 7, limit=2, paths=paths).equal(windows[:2])
    assert text.test_windows(dataset, tokenizer, 7, limit=10_000, paths=paths).equal(windows)


def test_old_c4_is_the_published_random_windows(
    tokenizer: PreTrainedTokenizerFast, encode: Encode, tmp_path: Path
) -> None:
    # No document of exactly a window: there the published code fails.
    documents = [LETTERS[i % 400] * (5 if i % 3 else 20 + i % 11) for i in range(900)]
    write_c4(tmp_path, "validation", "00008", documents)
    windows = text.test_windows("c4", tokenizer, 16, paths={"c4": tmp_path})
    expected = [encode(documents[i][s : s + 16]) for i, s in published_draws(documents, 256, 16, 0)]
    assert windows.equal(torch.stack(expected))
    assert text.test_windows("c4", tokenizer, 16, limit=9, paths={"c4": tmp_path}).equal(windows[:9])


def test_new_c4_takes_256_windows_of_the_first_1100_documents(
    tokenizer: PreTrainedTokenizerFast, encode: Encode, tmp_path: Path
) -> None:
    documents = ["abcdefg"] * 1100 + ["z" * 5000]
    write_c4(tmp_path, "validation", "00008", documents)
    windows = text.test_windows("c4_new", tokenizer, 8, paths={"c4": tmp_path})
    assert windows.equal(encode("abcdefg " * 256).view(256, 8))
    long = text.test_windows("c4_new", tokenizer, 64, paths={"c4": tmp_path})
    assert long.shape == (8799 // 64, 64)
    assert not (long == encode("z")).any()


def test_c4_calibration_makes_the_published_draws_but_for_documents_kept_for_selection(
    tokenizer: PreTrainedTokenizerFast, encode: Encode, tmp_path: Path
) -> None:
    documents = [LETTERS[i] * (5 if i % 3 else 20 + i % 11) for i in range(400)]
    write_c4(tmp_path, "train", "01024", documents)
    for seed in (0, 3):
        windows = text.calibration_windows("c4", tokenizer, 20, 16, seed, {"c4": tmp_path})
        draws = [(i, s) for i, s in published_draws(documents, 60, 16, seed) if i % 10 != 9][:20]
        assert windows.equal(torch.stack([encode(documents[i][s : s + 16]) for i, s in draws]))


def test_a_whole_c4_shard_keeps_a_fiftieth_for_selection() -> None:
    assert sum(text._kept_for_selection(i, 356_317) for i in range(356_317)) == 356_317 // 50
    assert sum(text._kept_for_selection(i, 100) for i in range(100)) == 10


@pytest.mark.parametrize("dataset", ["wikitext2", "ptb", "ptb_new"])
def test_calibration_on_a_text_is_random_windows_of_one_encoding(
    dataset: str, tokenizer: PreTrainedTokenizerFast, encode: Encode, paths: dict[str, Path]
) -> None:
    joined = "\n\n".join(WIKITEXT["train"])
    if dataset != "wikitext2":
        joined = (" " if dataset == "ptb_new" else "\n\n").join(PTB["train"][:36])
    random.seed(5)
    starts = [random.randint(0, len(joined) - 9 - 1) for _ in range(4)]
    windows = text.calibration_windows(dataset, tokenizer, 4, 9, 5, paths)
    assert windows.equal(torch.stack([encode(joined[s : s + 9]) for s in starts]))


@pytest.mark.parametrize("dataset", ["wikitext2", "ptb", "ptb_new", "c4", "c4_new"])
def test_windows_depend_on_the_seed_alone(
    dataset: str, tokenizer: PreTrainedTokenizerFast, paths: dict[str, Path]
) -> None:
    for windows in (text.calibration_windows, text.selection_windows):
        first = windows(dataset, tokenizer, 2, 6, 1, paths)
        random.seed(99), torch.manual_seed(99)
        assert first.shape == (2, 6)
        assert first.equal(windows(dataset, tokenizer, 2, 6, 1, paths))
        assert any(not first.equal(windows(dataset, tokenizer, 2, 6, seed, paths)) for seed in range(2, 9))


@pytest.mark.parametrize("dataset", ["ptb", "ptb_new", "c4", "c4_new"])
def test_no_document_serves_calibration_selection_and_test(
    dataset: str, tokenizer: PreTrainedTokenizerFast, encode: Encode, paths: dict[str, Path]
) -> None:
    letters = set(encode(LETTERS).tolist())
    fit, choose = set(), set()
    for seed in range(12):
        fit |= set(text.calibration_windows(dataset, tokenizer, 8, 6, seed, paths).flatten().tolist()) & letters
        choose |= set(text.selection_windows(dataset, tokenizer, 2, 6, seed, paths).flatten().tolist()) & letters
    score = set(text.test_windows(dataset, tokenizer, 6, 20, paths).flatten().tolist()) & letters
    assert fit and choose
    assert not fit & choose and not fit & score and not choose & score


def test_wikitext_selection_is_the_validation_split(
    tokenizer: PreTrainedTokenizerFast, encode: Encode, paths: dict[str, Path]
) -> None:
    ids = encode("\n\n".join(WIKITEXT["validation"]))
    windows = text.selection_windows("wikitext2", tokenizer, len(ids) // 5, 5, 0, paths)
    assert windows.equal(ids[: len(ids) // 5 * 5].view(-1, 5))


def test_embedded_windows_are_spread_over_the_text_and_stratified_by_seed(
    tokenizer: PreTrainedTokenizerFast, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = [LETTERS[:50], LETTERS[50:118], LETTERS[200:240]]
    parts = articles.Split(side, [False, False, True], [LETTERS[300:330], "abc"])
    monkeypatch.setattr(articles, "read", lambda name: parts)
    ids = encode("\n\n".join(side))[:160].view(40, 4)  # windows 30 and later touch the document kept for selection
    assert text.calibration_windows("embedded_wiki", tokenizer, 6, 4, 0).equal(ids[[0, 6, 12, 18, 24, 29]])
    assert text.calibration_windows("embedded_wiki", tokenizer, 30, 4, 0).equal(ids[:30])
    drawn = set()
    for seed in range(1, 9):
        windows = text.calibration_windows("embedded_c4", tokenizer, 7, 4, seed)
        assert windows.equal(text.calibration_windows("embedded_c4", tokenizer, 7, 4, seed))
        places = [int((ids == window).all(1).nonzero()) for window in windows]
        assert [place // 5 for place in places[:6]] == list(range(6)) and max(places) < 30 and len(set(places)) == 7
        drawn.add(tuple(places))
    assert len(drawn) == 8
    with pytest.raises(UserError, match="30 windows of 4 tokens, 31 asked for"):
        text.calibration_windows("embedded_wiki", tokenizer, 31, 4, 0)
    assert text.selection_windows("embedded_wiki", tokenizer, 10, 4, 0).equal(encode(LETTERS[200:240]).view(10, 4))
    assert text.test_windows("embedded_wiki", tokenizer, 5).equal(encode(LETTERS[300:330] + "\n\nabc").view(7, 5))


@pytest.mark.parametrize("dataset", ["wikitext2", "ptb", "ptb_new", "c4", "c4_new"])
@pytest.mark.parametrize("role", ["calibration", "selection"])
def test_too_little_text_says_how_many_windows_there_are(
    dataset: str, role: str, tokenizer: PreTrainedTokenizerFast, paths: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=rf"{dataset} for {role} has \d+ windows of 9 tokens, 500 .*lower the number"):
        getattr(text, f"{role}_windows")(dataset, tokenizer, 500, 9, 0, paths)


@pytest.mark.parametrize("dataset", text.DATASETS[:5])
def test_a_window_longer_than_the_test_text_is_refused(
    dataset: str, tokenizer: PreTrainedTokenizerFast, paths: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=rf"{dataset} for test has 0 windows of 9999 tokens.*the window"):
        text.test_windows(dataset, tokenizer, 9999, paths=paths)


@pytest.mark.parametrize(("samples", "window", "field"), [(0, 8, "samples is 0"), (-1, 8, "-1"), (4, 0, "window is 0")])
def test_numbers_below_one_are_refused(
    samples: int, window: int, field: str, tokenizer: PreTrainedTokenizerFast, paths: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=field):
        text.calibration_windows("c4", tokenizer, samples, window, 0, paths)
    with pytest.raises(UserError, match=field):
        text.selection_windows("c4", tokenizer, samples, window, 0, paths)
    with pytest.raises(UserError, match=field):
        text.test_windows("c4", tokenizer, window, samples, paths)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'wikitext' is not known.*did you mean 'wikitext2'"):
        text.check("wikitext", "test")
    with pytest.raises(UserError, match="'train' is not known; allowed: calibration, selection, test"):
        text.check("c4", "train")
    for role in text.ROLES:
        text.check("embedded_wiki", role)


def test_too_few_documents_to_keep_one_for_selection(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_c4(tmp_path, "train", "01024", ["some words and more of them " * 9] * 9)
    with pytest.raises(UserError, match=r"c4 for selection has 0 windows of 16 tokens, 1 asked for; .* more text"):
        text.selection_windows("c4", tokenizer, 1, 16, 0, {"c4": tmp_path})


def write_c4(folder: Path, split: str, shards: str, documents: list[str]) -> None:
    with gzip.open(folder / f"c4-{split}.00000-of-{shards}.json.gz", "wt", encoding="utf8") as stream:
        stream.writelines(json.dumps({"text": document, "timestamp": "t"}) + "\n" for document in documents)
