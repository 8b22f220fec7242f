"""The notification hook, against a real command and a real HTTP server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from genus import notify

CALL = "import sys; from genus import notify; notify.send('failure', 'a: broke', run='nightly'); print('goes on')"


class Hook(HTTPServer):
    """Answers every POST with ``status`` and keeps what came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.got = 200, list[tuple[str, dict[str, object]]]()
        self.url = f"http://127.0.0.1:{self.server_port}/T0/secret?token=secret"


class Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/json"
        self.server.got.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def send(folder: Path, target: str) -> str:
    """What a process that notifies says; it always goes on and ends well."""
    environment = os.environ | {notify.VARIABLE: target}
    done = subprocess.run([sys.executable, "-c", CALL], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "goes on\n"
    return done.stderr


def test_url_gets_the_event(hook: Hook, tmp_path: Path) -> None:
    assert send(tmp_path, hook.url) == ""
    said = {"event": "failure", "text": "a: broke", "run": "nightly", "workspace": tmp_path.name}
    assert hook.got == [("/T0/secret?token=secret", said)]


def test_command_gets_the_event_without_a_shell(tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'import sys; open(sys.argv[1], \"w\").write(sys.stdin.read())' '$HOME; it.json'"
    assert send(tmp_path, command) == ""
    assert json.loads((tmp_path / "$HOME; it.json").read_text())["text"] == "a: broke"


def test_nothing_is_sent_where_nobody_asks(tmp_path: Path) -> None:
    assert send(tmp_path, "") == ""


def test_failing_hook_is_one_line_without_its_secrets(hook: Hook, tmp_path: Path) -> None:
    hook.status = 500
    closed = HTTPServer(("127.0.0.1", 0), Handler)
    closed.server_close()
    for target, line in {
        hook.url: "127.0.0.1: HTTP status 500",
        f"http://127.0.0.1:{closed.server_port}/secret": "127.0.0.1: Connection refused",
        "https://nowhere.invalid/secret": "nowhere.invalid: ",
        "http://me:secret@127.0.0.1:1/": "127.0.0.1: ",
        "http://127.0.0.1:1/\x01secret": "127.0.0.1: ",
        "http://[secret": "not a URL",
        f"{sys.executable} -c 'raise SystemExit(3)' secret": f"{Path(sys.executable).name}: exit status 3",
        "/no/such/program secret": "program: No such file or directory",
        "program 'secret": "not a command: ",
    }.items():
        said = send(tmp_path, target)
        start = f"genus: warning: GENUS_NOTIFY: nobody was told of this failure: {line}"
        assert said.startswith(start) and said.count("\n") == 1 and "secret" not in said, (target, said)


def test_hook_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr(notify, "TIMEOUT", 0.2)
    monkeypatch.setenv(notify.VARIABLE, "sleep 60")
    notify.send("promotion", "x is champion")
    assert "sleep: did not end within 0.2 s" in capsys.readouterr().err  # type: ignore[attr-defined]
