"""What all sources of text can be told, and how a document that is too long is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import Field

from genus.config import Section


class Text(Section):
    """Options of a source of text.

    ``test``: share of the documents that becomes the test split. ``longest``: characters; a longer document is cut into
    parts, which stay in one split. ``least``: the alphabet is the symbols that are at least so often in the train
    split; every other is stored as U+FFFD, which is part of the alphabet where it is needed.
    """

    test: float = Field(0.05, gt=0, lt=1)
    longest: int = Field(10_000, ge=10)
    least: int = Field(1, ge=1)


def cut(pieces: Iterable[str], longest: int) -> Iterator[tuple[str, bool]]:
    """One document, given in pieces: (a part of at most ``longest`` characters, whether it goes on from one before).

    Cut behind the last white space of a part's second half, else wherever it is full. Blank lines around the document
    are left out; besides them the parts put together are the document. Holds no more than a part and a piece.
    """
    held, goes_on = "", False
    for piece in pieces:
        held += piece
        if not goes_on:
            held = held.lstrip("\n")
        while len(held.rstrip("\n")) > longest:
            end = 1 + max(held.rfind(space, longest // 2, longest) for space in " \n\t")
            end = end if end > 0 else longest
            yield held[:end], goes_on
            held, goes_on = held[end:], True
    if held.strip():
        yield held.rstrip("\n"), goes_on
