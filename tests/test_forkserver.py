"""Stages handed to the forkserver: same output, status and environment as without, and nothing outlives its asker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genus import forkserver

pytestmark = pytest.mark.skipif(not forkserver.AVAILABLE, reason="the forkserver needs Linux's pidfd_open")

# Stands in for the real server: no libraries, and what is asked for is Python code.
SERVER = """
import sys
from pathlib import Path
from genus import forkserver

forkserver.LIBRARIES = ()
arguments = forkserver.serve(Path(sys.argv[1]))
if arguments is not None:
    exec(arguments[0])
"""
ASK = "import sys; from genus import forkserver; sys.exit(forkserver.hand_over(sys.argv[1:]))"
HANDED = {"GENUS_FORKSERVER": "forks.sock", "COLOUR": "green"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", SERVER, "forks.sock"], cwd=tmp_path, stdin=subprocess.PIPE) as process:
        wait_for(tmp_path / "forks.sock")
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
    assert not (tmp_path / "forks.sock").exists()


def wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come within {seconds} s"
        time.sleep(0.02)


def ask(folder: Path, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ASK, code],
        cwd=folder,
        env=os.environ | HANDED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_output_status_folder_and_environment_are_the_askers(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    code = "import os; print(os.getcwd(), os.environ['COLOUR'], 'GENUS_FORKSERVER' in os.environ); sys.exit(2)"
    out, error = ask(tmp_path, code).communicate(timeout=20)
    assert out == f"{tmp_path} green False\n"
    assert not error
    asked = ask(tmp_path, "sys.exit('one line')")
    assert asked.communicate(timeout=20)[1] == "one line\n"
    assert asked.returncode == 1


def test_requests_run_side_by_side(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    wait = "import time\nwhile not Path('{}').exists(): time.sleep(0.02)\nPath('{}').touch()"
    first = ask(tmp_path, wait.format("b", "c"))  # ends only when the second has begun
    second = ask(tmp_path, "Path('b').touch()\n" + wait.format("c", "d"))
    assert first.wait(20) == second.wait(20) == 0


def test_a_killed_worker_is_the_askers_status(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    assert ask(tmp_path, "import os; os.kill(os.getpid(), 9)").wait(20) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_asker(tmp_path: Path, server: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # The worker has a child of its own, and both ignore a polite request.
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nchild = os.fork()\n"
        "if child: Path('a').write_text(f'{os.getpid()} {child}'); Path('a').rename('pids')\ntime.sleep(60)"
    )
    asked = ask(tmp_path, code)
    wait_for(tmp_path / "pids")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    started = time.monotonic()
    asked.send_signal(number)
    asked.wait(10)
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() - started < forkserver.GRACE + 2
        time.sleep(0.05)


def test_without_a_server_nothing_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert forkserver.hand_over(["train", "x"]) is None
    monkeypatch.setenv(forkserver.VARIABLE, str(tmp_path / "nobody.sock"))
    assert forkserver.hand_over(["train", "x"]) is None


def test_a_request_that_is_too_long_is_done_by_the_asker(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    code = f"import os; from genus import forkserver; os.environ['LONG'] = 'x' * {1 << 17}; " + (
        "sys.exit(7 if forkserver.hand_over(['print()']) is None else 0)"
    )
    asked = subprocess.run([sys.executable, "-c", f"import sys; {code}"], cwd=tmp_path, env=os.environ | HANDED)
    assert asked.returncode == 7


def test_what_is_imported_ahead_holds_no_code_of_genus() -> None:
    """A stage must run the code that DVC has hashed, not what the server had read before a change."""
    assert not [name for name in forkserver.LIBRARIES if name.startswith("genus")]


def test_a_request_goes_on_without_the_server_and_ends_with_its_supervisor(tmp_path: Path) -> None:
    code = "import time\nPath('a').write_text(f'{os.getpid()} {os.getppid()}'); Path('a').rename('pids')\n"
    code = "import os\n" + code + "while not Path('go').exists(): time.sleep(0.02)"
    with subprocess.Popen([sys.executable, "-c", SERVER, "forks.sock"], cwd=tmp_path, stdin=subprocess.PIPE) as process:
        wait_for(tmp_path / "forks.sock", 60)
        first = ask(tmp_path, code)
        wait_for(tmp_path / "pids", 60)
        worker, supervisor = map(int, (tmp_path / "pids").read_text().split())
        (tmp_path / "pids").unlink()
        second = ask(tmp_path, code)
        wait_for(tmp_path / "pids", 60)
        process.kill()
        assert not gone(worker)
        os.kill(supervisor, signal.SIGKILL)
        assert first.wait(60) == 128 + signal.SIGKILL  # what its supervisor's end looks like
        deadline = time.monotonic() + 20
        while not gone(worker):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (tmp_path / "go").touch()
        assert second.wait(60) == 0
