"""How far the running stages are, on the page of Prefect's flow run: a progress artifact a stage that says it."""

from __future__ import annotations

import contextvars
import json
import re
import threading
import time
from collections.abc import Collection
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from pipelines.children import progress_path

EVERY = 2.0  # seconds between two updates


class Progress:
    """``show`` it now and then which stages run; a thread of its own tells the server, which may be slow."""

    def __init__(self) -> None:
        self._artifacts: dict[str, UUID] = {}
        self._next = 0.0
        self._thread: threading.Thread | None = None

    def show(self, running: Collection[str]) -> None:
        """Updates what has been said for 2 s; never waits for the server, and leaves out what it is too slow for."""
        if time.monotonic() < self._next or (self._thread and self._thread.is_alive()):
            return
        self._next = time.monotonic() + EVERY
        shares = {stage: share for stage in running if (share := _share(stage)) is not None}
        if shares:  # with this thread's context: it knows the flow run
            run = contextvars.copy_context().run
            self._thread = threading.Thread(target=run, args=(self._update, shares), daemon=True)
            self._thread.start()

    def _update(self, shares: dict[str, float]) -> None:
        try:
            with get_client(sync_client=True) as client:
                for stage, share in shares.items():
                    if stage in self._artifacts:
                        client.update_artifact(self._artifacts[stage], ArtifactUpdate(data=share))
                    else:
                        key = f"progress-{re.sub('[^a-z0-9]+', '-', stage.lower())}"
                        made = create_progress_artifact(share, key=key, description=stage)
                        self._artifacts[stage] = made if isinstance(made, UUID) else UUID(str(made))
        except httpx.HTTPError:
            return  # it is only a picture: the next update may reach the server


def _share(stage: str) -> float | None:
    """Percent of a running stage that is done, as its progress file says; None where it says nothing."""
    try:
        said = json.loads(progress_path(stage).read_text(encoding="utf-8"))
        return 100.0 * min(1.0, said["step"] / max(1, said["total"]))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
