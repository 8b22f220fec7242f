"""The topics of Python's own help (``pydoc_data.topics``): 0.4 million characters of technical English, always there.

The smoke data set for text. Each version of Python has its own text, so the data set's hash is that version's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import Field

from genus.data.sources import About, Document
from genus.data.sources._text import Text, cut


class PythonDocs(Text):
    """A document is a paragraph. The topics quote each other: a paragraph that is there again is left out."""

    test: float = Field(0.1, gt=0, lt=1)
    longest: int = Field(2000, ge=10)
    least: int = Field(5, ge=1)

    def about(self) -> About:
        return About(
            spec=None,
            licence="PSF-2.0",
            source="help topics of CPython (pydoc_data.topics), a document a paragraph",
            count=len(self._paragraphs()),
            test=self.test,
            kind="text",
            least=self.least,
        )

    def examples(self) -> Iterator[Document]:
        for number, paragraph in enumerate(self._paragraphs()):
            for text, goes_on in cut([paragraph], self.longest):
                yield Document("train", text, f"paragraph {number}", goes_on)

    def _paragraphs(self) -> list[str]:
        from pydoc_data.topics import topics

        every = (part.strip("\n") for topic in topics.values() for part in re.split(r"\n\s*\n", topic))
        return list(dict.fromkeys(part for part in every if part.strip()))


Source = PythonDocs
