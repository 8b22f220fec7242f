"""Tells somebody: a command or a URL from the variable GENUS_NOTIFY learns of failures and promotions.

    GENUS_NOTIFY=https://hooks.example.org/T0/secret    # gets the JSON by POST
    GENUS_NOTIFY="mail-me --to ops@example.org"         # gets the JSON on its standard input; no shell

The JSON: ``event`` (``failure``, ``promotion``), ``text`` (what chat services show), ``workspace`` (the folder's
name), and what the event has besides.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

VARIABLE = "GENUS_NOTIFY"
TIMEOUT = 10  # seconds, for either


def send(event: str, text: str, **details: object) -> None:
    """Sends the event where GENUS_NOTIFY says, nowhere where it is not set.

    Never raises: a hook that fails is one line on standard error, which names the host or the program only, for the
    rest of a URL or a command may be a secret. ``details`` must be JSON.
    """
    target = os.environ.get(VARIABLE, "").strip()
    if not target:
        return
    body = json.dumps({"event": event, "text": text, "workspace": Path.cwd().name, **details}).encode()
    hook = _post if target.lower().startswith(("http://", "https://")) else _call
    trouble = hook(target, body)
    if trouble:
        print(f"genus: warning: {VARIABLE}: nobody was told of this {event}: {trouble}", file=sys.stderr, flush=True)


def _post(url: str, body: bytes) -> str:
    """What went wrong, or nothing."""
    try:
        host = urlsplit(url).hostname or "no host"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", "User-Agent": "genus"})
        urllib.request.urlopen(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        return f"{host}: HTTP status {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
        return f"{host}: {(reason.strerror if isinstance(reason, OSError) else None) or type(reason).__name__}"
    except (OSError, http.client.HTTPException) as error:  # their messages may hold the URL
        return f"{host}: {type(error).__name__}"
    except ValueError:
        return "not a URL"
    return ""


def _call(command: str, body: bytes) -> str:
    """What went wrong, or nothing."""
    try:
        words = shlex.split(command)
    except ValueError:
        return "not a command: a quotation mark is open"
    program = Path(words[0]).name
    try:
        done = subprocess.run(words, input=body, capture_output=True, timeout=TIMEOUT)
    except OSError as error:
        return f"{program}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{program}: did not end within {TIMEOUT} s"
    return f"{program}: exit status {done.returncode}" if done.returncode else ""
