"""No library asks anybody's server anything: said once, for this process and all that it starts."""

from __future__ import annotations

import os

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a cold database takes 20 s, which is the default
}


def quieten() -> None:
    """Turns analytics and prompts off, unless the user's environment says otherwise. Before the libraries' import."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
