"""Windows of tokens by data set and role.

==================  ==============================  =========================  ================================
data set            calibration                     selection                  test
==================  ==============================  =========================  ================================
``wikitext2``       train, random windows           validation                 test, joined by two newlines
``ptb``             train, first nine tenths        train, last tenth          validation, joined by two newlines
``ptb_new``         as ``ptb``, joined by a space   train, last tenth          test, joined by a space
``c4``, ``c4_new``  random documents of the first   documents of the same      first validation shard:
                    training shard                  shard that calibration     256 random windows (``c4``), first
                                                    leaves out                 1,100 documents (``c4_new``)
``embedded_wiki``,  windows spread over the first   every fifteenth document   the last 40%, joined by two
``embedded_c4``     60% that touch no document      of the first 60%           newlines
                    kept for selection
==================  ==============================  =========================  ================================

No document serves two roles, whatever the seeds. The protocol of the larger three is that of Frantar et al. (2023),
with their random draws, except that calibration on C4 skips the fiftieth of the documents kept for selection, and on
PTB the last tenth of the sentences.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bc.data import articles, sources
from bc.data.sources import Paths
from bc.errors import UserError, unknown
from bc.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASETS = ("wikitext2", "ptb", "ptb_new", "c4", "c4_new", "embedded_wiki", "embedded_c4")
ROLES = ("calibration", "selection", "test")

#: Published protocol of C4: so many random windows, or the windows of so many first documents.
C4_WINDOWS = 256
C4_NEW_DOCUMENTS = 1100


def check(dataset: str, role: str, paths: Paths | None = None) -> None:
    """Find out cheaply whether a text can be had; nothing is read or downloaded.

    Args:
        dataset: One of :data:`DATASETS`.
        role: ``calibration``, ``selection`` or ``test``.
        paths: Name (``wikitext2``, ``ptb``, ``c4``) → local file or folder; see :mod:`bc.data.sources`.

    Raises:
        UserError: The name or role is unknown, or the source is certain to be missing.
    """
    if dataset not in DATASETS:
        raise unknown("data: the data set", dataset, DATASETS)
    if role not in ROLES:
        raise unknown("data: the role", role, ROLES)
    if not dataset.startswith("embedded_"):
        sources.check(_base(dataset), _split(dataset, role), paths)


def is_here(dataset: str, role: str, paths: Paths | None = None) -> bool:
    """Whether a text needs no network, as far as can be said without reading it; arguments as for :func:`check`."""
    if dataset.startswith("embedded_"):
        return True
    return sources.is_here(_base(dataset), _split(dataset, role), paths)


def where_from(dataset: str) -> str:
    """What to set for a text that is to be read from a local folder."""
    base = _base(dataset)
    return f"{base} (data.paths.{base} or {sources.SOURCES[base].variable})"


def calibration_windows(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    window: int,
    seed: int,
    paths: Paths | None = None,
) -> Tensor:
    """Windows to fit on.

    Args:
        dataset: One of :data:`DATASETS`.
        tokenizer: The model's tokenizer.
        samples: How many windows.
        window: Tokens per window.
        seed: Chooses the windows; an embedded text at seed 0 gives evenly spaced ones.
        paths: As for :func:`check`.

    Returns:
        Token ids, int64, shape (samples, window).

    Raises:
        UserError: A number is not positive, the source is missing, or there is too little text.
    """
    _check_numbers("calibration", samples, window)
    check(dataset, "calibration", paths)
    where = f"{dataset} for calibration"
    if dataset.startswith("embedded_"):
        parts = articles.read(dataset.removeprefix("embedded_"))
        ids, free = _beside_selection(tokenizer, parts, window)
        return _spread(ids, samples, window, seed, where, free)
    rows = sources.rows(_base(dataset), _split(dataset, "calibration"), paths)
    if _base(dataset) == "c4":
        return _from_documents(rows, tokenizer, samples, window, seed, where, keep_selection_out=True)
    rows = rows[: _selection_start(len(rows))] if _base(dataset) == "ptb" else rows
    ids = _encode(tokenizer, _joint(dataset).join(rows))
    _require(len(ids) // window, samples, window, where)
    draw = random.Random(seed)
    return torch.stack([ids[start : start + window] for start in (_start(draw, ids, window) for _ in range(samples))])


def selection_windows(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    window: int,
    seed: int,
    paths: Paths | None = None,
) -> Tensor:
    """Windows to choose between settings on; arguments, shape and errors as :func:`calibration_windows`.

    Their documents are used neither by calibration, at any seed, nor by a test.
    """
    _check_numbers("selection", samples, window)
    check(dataset, "selection", paths)
    where = f"{dataset} for selection"
    if dataset.startswith("embedded_"):
        documents = articles.read(dataset.removeprefix("embedded_")).selection
        return _spread(_encode(tokenizer, articles.SEPARATOR.join(documents)), samples, window, seed, where)
    rows = sources.rows(_base(dataset), _split(dataset, "selection"), paths)
    if _base(dataset) == "c4":
        kept = [text for index, text in enumerate(rows) if _kept_for_selection(index, len(rows))]
        return _from_documents(kept, tokenizer, samples, window, seed, where)
    rows = rows[_selection_start(len(rows)) :] if _base(dataset) == "ptb" else rows
    return _spread(_encode(tokenizer, _joint(dataset).join(rows)), samples, window, seed, where)


def test_windows(
    dataset: str, tokenizer: PreTrainedTokenizerBase, window: int, limit: int | None = None, paths: Paths | None = None
) -> Tensor:
    """Windows to score on: non-overlapping, the remainder dropped.

    Args:
        dataset: One of :data:`DATASETS`.
        tokenizer: The model's tokenizer.
        window: Tokens per window.
        limit: At most so many windows, the first; None is all.
        paths: As for :func:`check`.

    Returns:
        Token ids, int64, shape (windows, window).

    Raises:
        UserError: A number is not positive, the source is missing, or the text has no whole window.
    """
    _check_numbers("test", 1 if limit is None else limit, window)
    check(dataset, "test", paths)
    where = f"{dataset} for test"
    if dataset.startswith("embedded_"):
        documents = articles.read(dataset.removeprefix("embedded_")).test
        return _consecutive(_encode(tokenizer, articles.SEPARATOR.join(documents)), window, limit, where)
    rows = sources.rows(_base(dataset), _split(dataset, "test"), paths)
    if dataset == "c4":
        # The first of 256 draws are the draws of a smaller number, so a limit need not make them all.
        count = C4_WINDOWS if limit is None else min(limit, C4_WINDOWS)
        return _from_documents(rows, tokenizer, count, window, 0, where)
    if dataset == "c4_new":
        rows = rows[:C4_NEW_DOCUMENTS]
        limit = C4_WINDOWS if limit is None else min(limit, C4_WINDOWS)
    return _consecutive(_encode(tokenizer, _joint(dataset).join(rows)), window, limit, where)


test_windows.__test__ = False  # type: ignore[attr-defined]  # the name is not that of a test


def _base(dataset: str) -> str:
    return dataset.removesuffix("_new")


def _joint(dataset: str) -> str:
    return " " if dataset.endswith("_new") else "\n\n"


def _split(dataset: str, role: str) -> str:
    if role == "test":
        return "validation" if dataset in ("ptb", "c4", "c4_new") else "test"
    return "validation" if (dataset, role) == ("wikitext2", "selection") else "train"


def _selection_start(count: int) -> int:
    """First of the rows kept for selection; PTB's validation and test splits both serve as tests."""
    return count - count // 10


def _kept_for_selection(index: int, count: int) -> bool:
    """Whether a C4 training document is kept for selection.

    A fiftieth of a whole shard holds more windows than selection needs, and leaves nearly all of the published
    calibration draws as they are; a small local file has to give a tenth.
    """
    every = 50 if count >= 10_000 else 10
    return index % every == every - 1


def _check_numbers(role: str, samples: int, window: int) -> None:
    for name, value in ((f"number of {role} samples", samples), (f"{role} window", window)):
        if value < 1:
            raise UserError(f"data: the {name} is {value}; it must be at least 1: raise it")


def _require(available: int, samples: int, window: int, where: str) -> None:
    if available < samples:
        raise UserError(
            f"data: {where} has {available} windows of {window} tokens, {samples} asked for; "
            "lower the number of samples or the window, or give more text"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of one encoding, with the special tokens the tokenizer adds, shape (tokens,)."""
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)


def _consecutive(ids: Tensor, window: int, limit: int | None, where: str) -> Tensor:
    count = len(ids) // window
    _require(count, 1, window, where)
    return ids[: count * window].view(count, window)[:limit].clone()


def _beside_selection(tokenizer: PreTrainedTokenizerBase, parts: articles.Split, window: int) -> tuple[Tensor, Tensor]:
    """Token ids of the calibration side, and which of its windows touch no document kept for selection.

    Returns:
        (int64 of shape (tokens,), bool of shape (windows,)).
    """
    if not tokenizer.is_fast:
        raise UserError("data: an embedded text needs a fast tokenizer (tokenizer.json); add one to the model's folder")
    encoding = tokenizer(articles.SEPARATOR.join(parts.side), return_offsets_mapping=True, verbose=False)
    lengths = torch.tensor([len(text) + len(articles.SEPARATOR) for text in parts.side])
    ends = lengths.cumsum(0)
    spans = torch.tensor(encoding["offset_mapping"]).T.contiguous()
    kept = torch.tensor(parts.selected)
    first = torch.searchsorted(ends, spans[0], right=True).clamp(max=len(ends) - 1)
    last = torch.searchsorted(ends, (spans[1] - 1).clamp(min=0), right=True).clamp(max=len(ends) - 1)
    touched = kept[first] | kept[last]
    count = len(touched) // window
    ids = torch.tensor(encoding["input_ids"], dtype=torch.int64)
    return ids, ~touched[: count * window].view(count, window).any(1)


def _spread(ids: Tensor, samples: int, window: int, seed: int, where: str, free: Tensor | None = None) -> Tensor:
    """Distinct windows from all over a text: one from each of ``samples`` stretches, its first at seed 0.

    Where that window is not free, the next one that is takes its place (at the text's end, the nearest before).
    """
    windows = _consecutive(ids, window, None, where)
    places = list(range(len(windows))) if free is None else torch.nonzero(free).flatten().tolist()
    _require(len(places), samples, window, where)
    stride = len(windows) // samples
    targets = torch.arange(samples) * stride
    if seed:
        targets += torch.randint(stride, (samples,), generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = []
    for target in targets.tolist():
        at = min(bisect.bisect_left(places, target), len(places) - 1)
        chosen.append(places.pop(at))
    return windows[sorted(chosen)]


def _start(draw: random.Random, ids: Tensor, window: int) -> int:
    """A random window's start; like the published code's, it never takes the last token of a longer text."""
    return draw.randint(0, max(len(ids) - window - 1, 0))


def _from_documents(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    window: int,
    seed: int,
    where: str,
    keep_selection_out: bool = False,
) -> Tensor:
    """A random window of each of some random documents, shape (samples, window); too short documents are rejected."""
    if not documents:  # of fewer than ten none is kept for selection
        _require(0, samples, window, where)
    draws = _draws(documents, tokenizer, samples, window, seed, where, keep_selection_out)
    return torch.stack(list(track(draws, f"windows of {where}", total=samples, unit="window")))


def _draws(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    window: int,
    seed: int,
    where: str,
    keep_selection_out: bool,
) -> Iterator[Tensor]:
    """Draw as the published code does, document and then start, but notice when there is too little text."""
    draw = random.Random(seed)
    kept_out = [keep_selection_out and _kept_for_selection(i, len(documents)) for i in range(len(documents))]
    lengths: dict[int, int] = {}
    made = 0
    while made < samples:
        index = draw.randint(0, len(documents) - 1)
        if lengths.get(index, window) < window:
            continue
        ids = _encode(tokenizer, documents[index])
        lengths[index] = len(ids)
        if len(lengths) == len(documents):  # all are known now, so it is known what there is
            _require(sum(n // window for i, n in lengths.items() if not kept_out[i]), samples, window, where)
        if len(ids) < window:
            continue
        start = _start(draw, ids, window)  # drawn for a document kept out too, so that the later draws stay the same
        if not kept_out[index]:
            made += 1
            yield ids[start : start + window]
