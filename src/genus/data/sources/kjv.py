"""The King James Bible of 1611 (its text as revised in 1769): 31,102 verses, 4.1 million characters of English.

Had from a local folder or from the Debian packages bible-kjv-text, the text in packed form, and bible-kjv, the program
that prints it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from genus.data.sources import About, Document
from genus.data.sources._debian import unpack
from genus.data.sources._text import Text, cut
from genus.errors import TransientError, UserError
from genus.files import write_text

FILE = "kjv.txt"
VERSES = 31_102
PACKAGES = ["bible-kjv-text", "bible-kjv"]
EVERYTHING = ["-f", "-l9999", "Gen1:1-Rev22:21"]  # one line a verse, none folded


class KingJames(Text):
    """``folder``: where kjv.txt is, or is put when fetched: a line a verse, such as ``Ge1:1 In the beginning …``."""

    folder: str = "data/raw/kjv"

    def about(self) -> About:
        path = Path(self.folder) / FILE
        if not path.exists():
            write_text(path, self._fetch())
        advice = "delete it, and it is fetched again"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}; {advice}") from error
        for number, line in enumerate(lines, 1):
            if not re.fullmatch(r"\w+\d+:\d+ .*\S.*", line):
                raise UserError(f"{path}: line {number}: expected a verse such as 'Ge1:1 In the …'; {advice}")
        if len(lines) != VERSES:
            raise UserError(f"{path}: {len(lines):,} verses, expected {VERSES:,}; {advice}")
        return About(
            spec=None,
            licence="public domain",  # but in the United Kingdom, where printing it is the Crown's privilege
            source="the King James Bible, a document a verse (Debian's bible-kjv-text)",
            count=VERSES,
            test=self.test,
            kind="text",
            least=self.least,
        )

    def examples(self) -> Iterator[Document]:
        with open(Path(self.folder) / FILE, encoding="utf-8") as file:
            for line in file:
                reference, _, verse = line.partition(" ")
                for text, goes_on in cut([" ".join(verse.split())], self.longest):
                    yield Document("train", text, reference, goes_on)

    def _fetch(self) -> str:
        """The text, as the program of the package prints it."""
        with tempfile.TemporaryDirectory(prefix="genus-") as scratch:
            try:
                folder = unpack(PACKAGES, Path(scratch)) / "usr"
                words = [str(folder / "bin" / "bible"), "-p", str(folder / "lib"), *EVERYTHING]
                done = subprocess.run(words, check=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
                return done.stdout.decode("utf-8")
            except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
                raise TransientError(
                    f"{self.folder}/{FILE}: not there, and Debian's packages cannot be had. Two ways to get the King "
                    f"James Bible: put its verses there, one a line, as 'Ge1:1 In the beginning …'; or on Debian or "
                    f"Ubuntu make `apt-get download {' '.join(PACKAGES)}` work (as root: apt-get update)"
                ) from error


Source = KingJames
