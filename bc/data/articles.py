"""The embedded texts: their documents, and which of them calibrate, select and test.

Both texts are split at document boundaries. The first documents, up to 60% of the characters, are the calibration
side and the others the test side; the selection part is taken out of the calibration side, again by whole documents.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from bc.data import embedded

#: Wikipedia articles shorter than this are redirects and the like.
SHORTEST_ARTICLE = 400
CALIBRATION_SHARE = 0.6
SEPARATOR = "\n\n"

_ARTICLE = re.compile(r'<doc [^>]*title="([^"]*)"[^>]*>\n(.*?)</doc>', re.DOTALL)


@dataclass(frozen=True)
class Split:
    """Documents by what they serve for; no document is in two parts.

    Attributes:
        side: Documents of the calibration side, in order.
        selected: For each of them, whether it is kept for selection.
        test: Documents that only score.
    """

    side: list[str]
    selected: list[bool]
    test: list[str]

    @property
    def calibration(self) -> list[str]:
        """Documents that fit."""
        return [text for text, kept in zip(self.side, self.selected, strict=True) if not kept]

    @property
    def selection(self) -> list[str]:
        """Documents that choose between settings."""
        return [text for text, kept in zip(self.side, self.selected, strict=True) if kept]


def articles(text: str) -> list[str]:
    """Articles of a text in ``<doc …>`` tags, laid out as WikiText lays them out.

    Args:
        text: The published file's content.

    Returns:
        `` = Title = ``, a blank line and the body of every article of at least :data:`SHORTEST_ARTICLE` characters.
    """
    found = []
    for match in _ARTICLE.finditer(text):
        title, body = html.unescape(match[1]), html.unescape(match[2]).strip()
        if body.startswith(title):  # the extraction repeats the title as the first line
            body = body[len(title) :].strip()
        if len(body) >= SHORTEST_ARTICLE:
            found.append(f" = {title} = \n\n{body}")
    return found


def split(documents: list[str]) -> Split:
    """Divide documents, in order, into calibration, selection and test.

    A document that occurs twice, as some web pages do, stays where it matters most: in the test, then in calibration.
    """
    count = _calibration_side(documents)
    test = documents[count:]
    scored = set(test)
    places = [index for index, text in enumerate(documents[:count]) if text not in scored]
    fitted = {documents[i] for i in places if not _is_selection(i)}
    places = [i for i in places if not (_is_selection(i) and documents[i] in fitted)]
    return Split([documents[i] for i in places], [_is_selection(i) for i in places], test)


def read(name: str) -> Split:
    """The documents of an embedded text, fetched on first use.

    Args:
        name: ``wiki``, whose documents are articles, or ``c4``, whose documents are lines.

    Raises:
        UserError: As :func:`bc.data.embedded.fetch`.
    """
    text = embedded.raw_text(name).read_text(encoding="utf8")
    return split(articles(text) if name == "wiki" else text.splitlines())


def _calibration_side(documents: list[str]) -> int:
    """Length of the smallest prefix that reaches the calibration share of the characters."""
    enough = CALIBRATION_SHARE * sum(map(len, documents))
    characters = 0
    for count, text in enumerate(documents, 1):
        characters += len(text)
        if characters >= enough:
            return count
    return len(documents)


def _is_selection(index: int) -> bool:
    """Whether a document of the calibration side, by its place, belongs to the selection part.

    Neighbouring documents are alike, so the part is spread over the text. Of every fifteen documents it takes the one
    that none of the Wikipedia text's 32 evenly spaced windows of 512 tokens touches, so that the reference setting's
    windows are those of the whole calibration side.
    """
    return index % 15 == 9
