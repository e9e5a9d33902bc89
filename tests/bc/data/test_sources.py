from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import LocalEntryNotFoundError
from pyarrow import parquet

from bc.data import sources, text
from bc.data.__main__ import main
from bc.errors import UserError

#: The hub's rows of a WikiText file: lines keep their ends, blank lines are empty.
WIKITEXT_FILE = " \n = Robert = \n \n He is , \n and was . \n"
WIKITEXT_ROWS = ["", " = Robert = \n", "", " He is , \n", " and was . \n"]
SENTENCES = ["no it was n't black", "mr. <unk> is N years old"]
DOCUMENTS = ["first\n\ndocument é", "second"]


def write_parquet(path: Path, rows: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: rows, "url": ["x"] * len(rows)}), path)


def write_lines(path: Path, rows: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf8") as stream:
        stream.writelines(json.dumps({column: row, "n": 1}) + "\n" for row in rows)


def as_parquet(folder: Path, split: str, rows: list[str], column: str) -> None:
    write_parquet(folder / f"{split}.parquet", rows, column)


def as_hub_parquet(folder: Path, split: str, rows: list[str], column: str) -> None:
    write_parquet(folder / "some_config" / f"{split}-00000-of-00001.parquet", rows, column)


def as_converted_parquet(folder: Path, split: str, rows: list[str], column: str) -> None:
    write_parquet(folder / "default" / split / "0000.parquet", rows, column)


def as_jsonl(folder: Path, split: str, rows: list[str], column: str) -> None:
    write_lines(folder / f"{split}.jsonl", rows, column)


def as_json_gz(folder: Path, split: str, rows: list[str], column: str) -> None:
    write_lines(folder / f"{split}.json.gz", rows, column)


def as_json_array(folder: Path, split: str, rows: list[str], column: str) -> None:
    (folder / f"{split}.json").write_text(json.dumps([{column: row} for row in rows], indent=1), encoding="utf8")


def as_saved_data_set(folder: Path, split: str, rows: list[str], column: str) -> None:
    DatasetDict({split: Dataset.from_dict({column: rows})}).save_to_disk(str(folder))


WRITERS = [as_parquet, as_hub_parquet, as_converted_parquet, as_jsonl, as_json_gz, as_json_array, as_saved_data_set]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("name", "split", "rows", "column"),
    [
        ("wikitext2", "test", WIKITEXT_ROWS, "text"),
        ("ptb", "validation", SENTENCES, "sentence"),
        ("c4", "validation", DOCUMENTS, "text"),
    ],
)
def test_every_format_gives_the_hubs_rows(
    write: Callable[[Path, str, list[str], str], None],
    name: str,
    split: str,
    rows: list[str],
    column: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, split, rows, column)
    assert sources.rows(name, split, {name: str(tmp_path)}) == rows
    monkeypatch.setenv(sources.SOURCES[name].variable, str(tmp_path))
    assert sources.rows(name, split, {name: None}) == rows
    assert sources.rows(name, split, None) == rows
    other = "train" if split != "train" else "test"
    with pytest.raises(UserError, match=f"no {other} split of {name}"):
        sources.check(name, other, None)


@pytest.mark.parametrize("inner", ["", "wikitext-2-raw-v1", "wikitext-2-raw"])
def test_raw_wikitext_files_give_the_hubs_rows(inner: str, tmp_path: Path) -> None:
    for other in ("wikitext-103-raw-v1", "wikitext-2-v1"):
        write_parquet(tmp_path / other / "test-00000-of-00001.parquet", ["another text"])
    (tmp_path / inner).mkdir(exist_ok=True)
    (tmp_path / inner / "wiki.test.raw").write_text(WIKITEXT_FILE, encoding="utf8")
    (tmp_path / inner / "wiki.test.tokens").write_text("<unk>", encoding="utf8")
    assert sources.rows("wikitext2", "test", {"wikitext2": tmp_path}) == WIKITEXT_ROWS


def test_penn_treebank_text_files_give_stripped_sentences(tmp_path: Path) -> None:
    for name, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        lines = [f" {name} {sentence} \n" for sentence in SENTENCES]
        (tmp_path / f"ptb.{name}.txt").write_text("".join(lines), encoding="utf8")
        assert sources.rows("ptb", split, {"ptb": tmp_path}) == [f"{name} {sentence}" for sentence in SENTENCES]


def test_c4_reads_the_first_shard_only_and_other_texts_all_shards(tmp_path: Path) -> None:
    for shard in (1, 0):
        write_lines(tmp_path / "en" / f"c4-train.{shard:05}-of-01024.json.gz", [f"c4 {shard}"])
        write_parquet(tmp_path / f"train-{shard:05}-of-00002.parquet", [f"ptb {shard}"])
    assert sources.rows("c4", "train", {"c4": tmp_path / "en"}) == ["c4 0"]
    assert sources.rows("ptb", "train", {"ptb": tmp_path}) == ["ptb 0", "ptb 1"]


def test_one_text_in_two_formats_is_read_once(tmp_path: Path) -> None:
    as_parquet(tmp_path, "test", SENTENCES, "text")
    as_jsonl(tmp_path, "test", SENTENCES, "text")
    assert sources.rows("ptb", "test", {"ptb": tmp_path}) == SENTENCES


def test_a_single_file_serves_the_split_it_is_named_after(tmp_path: Path) -> None:
    as_jsonl(tmp_path, "test", SENTENCES, "text")
    assert sources.rows("ptb", "test", {"ptb": tmp_path / "test.jsonl"}) == SENTENCES
    with pytest.raises(UserError, match="no train split"):
        sources.check("ptb", "train", {"ptb": tmp_path / "test.jsonl"})
    (tmp_path / "corpus.txt").write_text("text", encoding="utf8")
    with pytest.raises(UserError, match="no test split"):
        sources.check("ptb", "test", {"ptb": tmp_path / "corpus.txt"})


def test_the_setting_comes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("setting", "variable"):
        (tmp_path / name).mkdir()
        as_jsonl(tmp_path / name, "test", [name], "text")
    monkeypatch.setenv("BC_PTB", str(tmp_path / "variable"))
    assert sources.rows("ptb", "test", {"ptb": tmp_path / "setting"}) == ["setting"]
    assert sources.rows("ptb", "test", {"ptb": ""}) == ["variable"]


def test_new_protocols_use_the_path_of_the_old(tmp_path: Path) -> None:
    as_jsonl(tmp_path, "test", SENTENCES, "text")
    text.check("ptb_new", "test", {"ptb": tmp_path})
    with pytest.raises(UserError, match=r"data\.paths\.ptb: no validation split"):
        text.check("ptb", "test", {"ptb": tmp_path})


@pytest.mark.parametrize("name", list(sources.SOURCES))
def test_an_absent_path_is_named_with_the_mend(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"data\.paths\.{name}: nothing at '.*absent'; give a folder"):
        text.check(name, "test", {name: tmp_path / "absent"})
    variable = sources.SOURCES[name].variable
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    with pytest.raises(UserError, match=f"{variable}: nothing at"):
        text.check(name, "calibration", None)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("test.parquet", b"PAR1 no"),
        ("test.json.gz", b"no gzip"),
        ("test.json.gz", gzip.compress(b'{"text": "long enough to be cut"}\n' * 99, mtime=0)[:40]),
        ("test.jsonl", b'{"text": "one"}\n{"text": "tw'),
        ("test.jsonl", b"3\n"),
        ("test.txt", b"\xff\xfe\xff"),
    ],
)
def test_a_damaged_file_is_named(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}' cannot be read .*BC_PTB") as caught:
        sources.rows("ptb", "test", {"ptb": tmp_path})
    assert "\n" not in str(caught.value)


def test_a_file_without_text_or_without_its_column_is_refused(tmp_path: Path) -> None:
    as_jsonl(tmp_path, "test", ["a"], "body")
    with pytest.raises(UserError, match=r"columns \['body', 'n'\]; one must be called text or sentence"):
        sources.rows("ptb", "test", {"ptb": tmp_path})
    (tmp_path / "test.jsonl").write_text("\n", encoding="utf8")
    with pytest.raises(UserError, match="the test split has no text"):
        sources.rows("ptb", "test", {"ptb": tmp_path})


@pytest.mark.parametrize("value", [["a", "b"], 7])
@pytest.mark.parametrize("writer", [as_parquet, as_jsonl, as_saved_data_set])
def test_a_column_that_is_not_text_is_refused(writer: Any, value: Any, tmp_path: Path) -> None:
    writer(tmp_path, "test", [value], "text")
    with pytest.raises(UserError, match=rf"data.paths.ptb: row 0 of .* is a {type(value).__name__}, not text or null"):
        sources.rows("ptb", "test", {"ptb": tmp_path})


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
@pytest.mark.parametrize("name", list(sources.SOURCES))
def test_with_the_hub_off_a_check_says_what_to_set(
    name: str, variable: str, monkeypatch: pytest.MonkeyPatch, hub: FakeHub
) -> None:
    text.check(name, "test", None)
    assert not hub.asked, "a check must not wait for the network"
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match=rf"downloads are off.*set {sources.SOURCES[name].variable} to a folder"):
        text.check(name, "test", None)
    assert not hub.downloaded


class FakeHub:
    """The hub's client, with a cache and a server that are folders."""

    def __init__(self, server: Path) -> None:
        self.server = server
        self.asked: list[tuple[str, str | None, bool]] = []
        self.downloaded: set[str] = set()

    def file(self, repo: str, file: str, repo_type: str, local_files_only: bool) -> str:
        assert repo_type == "dataset"
        self.asked.append((repo, file, local_files_only))
        if file not in self.downloaded and (local_files_only or not (self.server / file).is_file()):
            raise LocalEntryNotFoundError("not in the cache\nsecond line")
        self.downloaded.add(file)
        return str(self.server / file)

    def snapshot(self, repo: str, allow_patterns: list[str], repo_type: str, local_files_only: bool) -> str:
        assert repo_type == "dataset" and "*.parquet" in allow_patterns and not any("py" in p for p in allow_patterns)
        self.asked.append((repo, None, local_files_only))
        if local_files_only and repo not in self.downloaded:
            raise LocalEntryNotFoundError("not in the cache")
        if not self.server.is_dir():
            raise ConnectionError("no route")
        self.downloaded.add(repo)
        return str(self.server)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "server")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot)
    return fake


def test_hub_files_are_asked_for_by_name_and_downloaded_once(hub: FakeHub) -> None:
    write_parquet(hub.server / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", WIKITEXT_ROWS)
    write_lines(hub.server / "en" / "c4-train.00000-of-01024.json.gz", DOCUMENTS)
    for _ in range(2):
        assert sources.rows("wikitext2", "test", None) == WIKITEXT_ROWS
        assert sources.rows("c4", "train", None) == DOCUMENTS
    wiki = ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")
    c4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
    assert hub.asked == [(*wiki, True), (*wiki, False), (*c4, True), (*c4, False), (*wiki, True), (*c4, True)]


def test_a_mirror_of_the_treebank_can_be_chosen(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    as_converted_parquet(hub.server / "penn_treebank", "validation", SENTENCES, "sentence")
    assert sources.rows("ptb", "validation", None) == SENTENCES
    monkeypatch.setenv("BC_PTB_HUB", "someone/ptb")
    assert sources.rows("ptb", "validation", None) == SENTENCES
    assert {repo for repo, *_ in hub.asked} == {"FALcon6/ptb_text_only", "someone/ptb"}
    with pytest.raises(UserError, match=r"someone/ptb cannot be had \(no files of that split\).*or BC_PTB_HUB"):
        sources.rows("ptb", "train", None)


def test_an_unreachable_hub_is_one_line_with_the_mend(hub: FakeHub) -> None:
    for name in sources.SOURCES:
        with pytest.raises(UserError, match=rf"set {sources.SOURCES[name].variable} to a folder with") as caught:
            sources.rows(name, "train", None)
        assert len(str(caught.value).split(os.linesep)) == 1


def test_whether_the_hub_answers_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that refuses answers; one that is not there does not, which is told before any cell begins."""
    asked: list[str] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(403)

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert main(["--hub"]) == 0
    thread.join()
    server.server_close()
    assert asked == ["/"]
    capsys.readouterr()  # the server's log
    assert main(["--hub"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hub: {endpoint} does not answer (") and "HF_HUB_OFFLINE=1" in said
    assert len(said.splitlines()) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["--hub"]) == 0


def test_with_the_hub_off_cached_files_are_used(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(hub.server / "en" / "c4-train.00000-of-01024.json.gz", DOCUMENTS)
    sources.rows("c4", "train", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text.check("c4", "calibration", None)
    assert sources.rows("c4", "train", None) == DOCUMENTS


def test_files_of_characters_are_not_the_treebanks_words(tmp_path: Path) -> None:
    """As in the folder of the original release."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text(" a word \n", encoding="utf8")
        (tmp_path / f"ptb.char.{split}.txt").write_text(" a _ w o r d \n", encoding="utf8")
    for split in ("train", "validation", "test"):
        assert list(sources.rows("ptb", split, {"ptb": str(tmp_path)})) == ["a word"]


def test_texts_are_only_joined_from_the_parts_of_one(tmp_path: Path) -> None:
    (tmp_path / "test-old.txt").write_text("a\n", encoding="utf8")
    (tmp_path / "test-new.txt").write_text("a\n", encoding="utf8")
    with pytest.raises(UserError, match=r"data.paths.wikitext2: test-new.txt, test-old.txt in .* leave one of them"):
        list(sources.rows("wikitext2", "test", {"wikitext2": str(tmp_path)}))
    inner = tmp_path / "parts"
    inner.mkdir()
    for number in (0, 2):
        (inner / f"train-0000{number}-of-00003.txt").write_text("a\n", encoding="utf8")
    with pytest.raises(UserError, match=r"data.paths.wikitext2: 2 of the 3 parts of wikitext2 are in"):
        list(sources.rows("wikitext2", "train", {"wikitext2": str(inner)}))
