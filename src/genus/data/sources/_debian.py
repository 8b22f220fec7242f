"""Files of Debian packages, without installing them: ``apt-get download`` and ``dpkg-deb -x`` need no root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TIMEOUT = 10  # seconds without an answer


def unpack(packages: list[str], scratch: Path) -> Path:
    """Downloads packages and returns the folder that holds their files. Raises OSError or SubprocessError."""

    def command(*words: str) -> None:
        subprocess.run(words, cwd=scratch, check=True, capture_output=True, timeout=300)

    patience = ("-o", f"Acquire::http::Timeout={TIMEOUT}", "-o", "Acquire::Retries=0")
    try:
        command("apt-get", *patience, "download", *packages)
    except subprocess.CalledProcessError:
        if os.geteuid() != 0:
            raise
        command("apt-get", *patience, "update")  # no lists yet, or stale ones; only root may
        command("apt-get", *patience, "download", *packages)
    for package in sorted(scratch.glob("*.deb")):
        command("dpkg-deb", "-x", str(package), "unpacked")
    return scratch / "unpacked"
