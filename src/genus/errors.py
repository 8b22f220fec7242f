"""What is printed as one line: "the user can mend this", exit status 2, and "try again later", exit status 75."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line that names the file, key or value and says what would be right."""


class TransientError(UserError):
    """What may be well by itself in a while: a download, a server that does not answer. The flow tries it again."""

    STATUS = 75  # EX_TEMPFAIL of sysexits.h


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt ``name``: the nearest known name, or all of them when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"
