"""Where WikiText2, PTB and C4 come from: a local file or folder, or the hub.

Looked for in this order: the setting ``paths.<name>``, the environment variable ``BC_WIKITEXT2``, ``BC_PTB`` or
``BC_C4``, the hub. A local path is one of

* a folder with the files, in itself or in a subfolder (``wikitext-2-raw-v1``, ``en``, …);
* a single file, which must be named after its split, and serves that split only;
* a ``save_to_disk`` folder of the ``datasets`` library, with one subfolder per split.

Files are found by split (``train``, ``validation`` or ``valid``, ``test``) and format:

=========  ============================================================================================
format     names, for the split ``test``
=========  ============================================================================================
parquet    ``test.parquet``, ``test-00000-of-00001.parquet``, ``*-test.parquet``, ``test/*.parquet``
json       ``test.json``, ``test.jsonl``, ``c4-test.00000-of-00008.json``, also with ``.gz``; an object a line
text       ``test.txt``, ``test.raw``, ``wiki.test.raw``, ``ptb.test.txt``: a row a line
=========  ============================================================================================

Parquet, json and ``save_to_disk`` need a column ``text`` or ``sentence``. Of C4 only the first shard of a split is
read. From the hub the same files are fetched by its own client, under its own settings (``HF_HOME``,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, …), and then read as local ones are: one path of code for both, and no script of
a data set is ever run. PTB is read from a mirror, or from the data set named in ``BC_PTB_HUB``.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from bc.errors import UserError

ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
COLUMNS = ("text", "sentence")
#: Depth of subfolders that are searched; enough for ``penn_treebank/test/0000.parquet``.
DEPTH = 2
FORMATS = (".parquet", ".json.gz", ".jsonl.gz", ".json", ".jsonl", ".txt", ".raw", ".txt.gz", ".raw.gz")
Paths = Mapping[str, str | Path | None]


@dataclass(frozen=True)
class Source:
    """One text collection.

    Attributes:
        name: The key in ``paths``.
        variable: The environment variable of its local path.
        repo: Its data set on the hub; see also :meth:`hub`.
        files: Split → file on the hub; where empty, the repository is searched as a local folder is.
        row: Makes a row out of a line of a text file, as the hub's rows are.
        first_shard: Whether only the first file of a split is read.
    """

    name: str
    variable: str
    repo: str
    files: Mapping[str, str]
    row: Callable[[str], str]
    first_shard: bool = False

    @property
    def hub(self) -> str:
        """The data set to ask the hub for: a mirror of PTB may be chosen, as there is no official one."""
        return (self.name == "ptb" and os.environ.get("BC_PTB_HUB")) or self.repo

    @property
    def example(self) -> str:
        """What to put into the variable."""
        return {
            "wikitext2": "a folder with wiki.train.raw, wiki.valid.raw and wiki.test.raw, or the hub's parquet files",
            "ptb": "a folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt, or parquet files named so",
            "c4": "a folder with c4-train.00000-of-01024.json.gz and c4-validation.00000-of-00008.json.gz",
        }[self.name]


def _wikitext_row(line: str) -> str:
    """The hub's rows keep a line's end, except that of a blank line: joining them depends on it."""
    return f"{line}\n" if line.strip() else ""


SOURCES = {
    "wikitext2": Source(
        "wikitext2",
        "BC_WIKITEXT2",
        "Salesforce/wikitext",
        {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ALIASES},
        _wikitext_row,
    ),
    # A mirror: the original, ptb_text_only, is a script, which the datasets library no longer runs.
    "ptb": Source("ptb", "BC_PTB", "FALcon6/ptb_text_only", {}, str.strip),
    "c4": Source(
        "c4",
        "BC_C4",
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        str,
        first_shard=True,
    ),
}


#: Folders beside the wanted one in a copy of the hub's data sets: the larger WikiText, and the one with ``<unk>``.
_OTHER_TEXT = re.compile(r"wikitext-103|wikitext-2-v1|\.")


def check(name: str, split: str, paths: Paths | None) -> None:
    """Complain about a source that is certain to be missing, without reading or downloading anything.

    Raises:
        UserError: The local path has no such split, or the hub is off and its files are not in the hub's cache.
    """
    if _local(SOURCES[name], paths) is not None or hub_is_off():
        _locate(SOURCES[name], split, paths)


def is_here(name: str, split: str, paths: Paths | None) -> bool:
    """Whether a local path was set for a source, or the hub's cache has its split; the network is not asked."""
    if _local(SOURCES[name], paths) is not None:
        return True
    with suppress(Exception):  # see _from_hub
        return bool(_ask_hub(SOURCES[name], split, local_files_only=True))
    return False


def rows(name: str, split: str, paths: Paths | None) -> list[str]:
    """Texts of a split, in order.

    Args:
        name: ``wikitext2``, ``ptb`` or ``c4``.
        split: ``train``, ``validation`` or ``test``.
        paths: Name → local file or folder.

    Returns:
        The rows as the hub's data set has them: lines of WikiText2, sentences of PTB, documents of C4.

    Raises:
        UserError: The source is missing or unreadable; the message says what to set.
    """
    source = SOURCES[name]
    found = [row for path in _locate(source, split, paths) for row in _read(path, source)]
    if not any(row.strip() for row in found):
        raise UserError(f"data.paths.{name}: the {split} split has no text; set {source.variable} to {source.example}")
    return found


def _local(source: Source, paths: Paths | None) -> tuple[str, Path] | None:
    """(where it was set, the path), or None where nothing was set."""
    given = (paths or {}).get(source.name)
    if given:
        return f"data.paths.{source.name}", Path(given).expanduser()
    given = os.environ.get(source.variable)
    return (source.variable, Path(given).expanduser()) if given else None


def _locate(source: Source, split: str, paths: Paths | None) -> list[Path]:
    local = _local(source, paths)
    if local is None:
        return _from_hub(source, split)
    setting, path = local
    if not path.exists():
        raise UserError(f"{setting}: nothing at {str(path)!r}; give {source.example}")
    if path.is_file():
        found = [path] if _split_of(path) == split and path.name.endswith(FORMATS) else []
    else:
        found = _search(path, split)
    if not found:
        raise UserError(f"{setting}: no {split} split of {source.name} at {str(path)!r}; give {source.example}")
    if source.first_shard:
        return found[:1]
    _require_shards(found, setting, source)
    return found


def _require_shards(found: Sequence[Path], setting: str, source: Source) -> None:
    """Refuse several files that are not the numbered parts of one, and parts that are not all there."""
    stems = {re.sub(r"\d+", "#", path.name) for path in found}
    if len(stems) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{setting}: {names} in {str(found[0].parent)!r} are not parts of one text; leave one of them")
    numbered = re.search(r"-\d+-of-(\d+)", found[0].name)
    if numbered and len(found) != int(numbered[1]):
        raise UserError(
            f"{setting}: {len(found)} of the {int(numbered[1])} parts of {source.name} are in "
            f"{str(found[0].parent)!r}; put the others there"
        )


def _split_of(path: Path) -> str | None:
    """The split that a file is named after; of the PTB release the files of single characters are another task's."""
    words = re.split(r"[^a-z]+", path.name.lower())
    if "char" in words:
        return None
    named = [split for split, aliases in ALIASES.items() if set(aliases) & set(words)]
    return named[0] if len(named) == 1 else None


def _search(folder: Path, split: str, depth: int = DEPTH) -> list[Path]:
    """Files of a split, shards in order: in the folder itself, else in the first subfolder that has any."""
    for alias in ALIASES[split]:
        if (folder / alias / "state.json").is_file():
            return [folder / alias]
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and _split_of(p) == split]
    anonymous = [p for alias in ALIASES[split] for p in sorted((folder / alias).glob("*")) if p.is_file()]
    for candidates in (files, anonymous):
        for ending in FORMATS:  # one format, lest a text be read twice
            found = [p for p in candidates if p.name.endswith(ending)]
            if found:
                return found
    for inner in sorted(folder.iterdir()) if depth else ():
        if inner.is_dir() and not _OTHER_TEXT.match(inner.name):
            found = _search(inner, split, depth - 1)
            if found:
                return found
    return []


def _read(path: Path, source: Source) -> Iterable[str]:
    try:
        if path.is_dir():
            from datasets import load_from_disk

            data = load_from_disk(str(path))
            return _texts(data[_column(data.column_names, path)], path, source)
        if path.name.endswith(".parquet"):
            from pyarrow import parquet

            column = _column(parquet.read_schema(path).names, path)
            return _texts(parquet.read_table(path, columns=[column]).column(column).to_pylist(), path, source)
        with gzip.open(path, "rt", encoding="utf8") if path.suffix == ".gz" else path.open(encoding="utf8") as stream:
            if ".json" in path.suffixes or ".jsonl" in path.suffixes:
                return _texts((record[_column(record, path)] for record in _records(stream)), path, source)
            return [source.row(line.removesuffix("\n")) for line in stream]
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.paths.{source.name}: {str(path)!r} cannot be read ({reason}); replace the file, or set "
            f"{source.variable} to {source.example}"
        ) from error


def _texts(values: Iterable[Any], path: Path, source: Source) -> list[str]:
    """Rows of a column; null is an empty one."""
    found = []
    for number, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"data.paths.{source.name}: row {number} of {str(path)!r} is a {type(value).__name__}, not text or "
                f"null; replace the file, or set {source.variable} to {source.example}"
            )
        found.append(value or "")
    return found


def _records(stream: TextIO) -> Iterator[dict[str, Any]]:
    """Objects of a json file: one a line, or one array of all."""
    first = stream.readline()
    if first.lstrip().startswith("["):
        yield from json.loads(first + stream.read())
        return
    for line in chain([first], stream):
        if line.strip():
            yield json.loads(line)


def _column(names: Iterable[str], path: Path) -> str:
    present = list(names)
    for column in COLUMNS:
        if column in present:
            return column
    raise UserError(f"data.paths: {str(path)!r} has columns {present}; one must be called text or sentence: rename it")


def hub_is_off() -> bool:
    """Whether the user switched downloads off."""
    variables = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in variables)


def check_hub(patience: float = 10.0) -> None:
    """Ask whether the hub answers, once and quickly: its client tries again and again for every file.

    Args:
        patience: Seconds to wait. Nothing is asked where downloads are off (``HF_HUB_OFFLINE=1``).

    Raises:
        UserError: It does not answer.
    """
    if not hub_is_off() and (trouble := hub_trouble(patience)):
        raise UserError(
            f"hub: {trouble}; connect to it, set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 where all that is needed "
            "lies in its cache"
        )


def hub_trouble(patience: float = 10.0) -> str:
    """Why the hub cannot be had, found by one request; empty where it answers, be it with a refusal.

    Args:
        patience: Seconds to wait.
    """
    from huggingface_hub import constants, get_session

    try:  # by the client's own session, which knows its proxies and certificates
        get_session().head(constants.ENDPOINT, timeout=patience)
    except Exception as error:  # see _from_hub
        return f"{constants.ENDPOINT} does not answer ({str(error).strip() or type(error).__name__})"
    return ""


def _from_hub(source: Source, split: str) -> list[Path]:
    """Files of a split in the hub's cache, downloaded unless they are there or the hub is off."""
    # The client's own errors, its HTTP library's and the file system's share no base class but Exception.
    with suppress(Exception):
        found = _ask_hub(source, split, local_files_only=True)
        if found:
            return found
    if hub_is_off():
        raise _unreachable(source, split, "downloads are off")
    try:
        found = _ask_hub(source, split, local_files_only=False)
    except Exception as error:
        raise _unreachable(source, split, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
    if not found:
        raise _unreachable(source, split, "no files of that split")
    return found


def _ask_hub(source: Source, split: str, local_files_only: bool) -> list[Path]:
    from huggingface_hub import hf_hub_download, snapshot_download

    how: dict[str, Any] = {"repo_type": "dataset", "local_files_only": local_files_only}
    if source.files:  # by name, for a listing of C4's repository takes minutes
        return [Path(hf_hub_download(source.hub, source.files[split], **how))]
    patterns = [f"*{ending}" for ending in FORMATS]
    return _search(Path(snapshot_download(source.hub, allow_patterns=patterns, **how)), split)


def _unreachable(source: Source, split: str, why: str) -> UserError:
    mirror = ", or BC_PTB_HUB to another data set on the hub" if source.name == "ptb" else ""
    return UserError(
        f"data.paths.{source.name}: the {split} split of {source.name} is not on this machine, and the hub's "
        f"{source.hub} cannot be had ({why.rstrip('.')}); set {source.variable} to {source.example}{mirror}"
    )
