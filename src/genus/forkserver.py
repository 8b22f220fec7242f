"""Stages from one warm process: what takes 5 s to import a stage, torch and MLflow, is there at once in a fork.

``genus run`` starts ``python -m genus.forkserver SOCKET``, which imports the libraries once and then forks a process a
request; ``genus STAGE NAME`` hands itself over where GENUS_FORKSERVER names a socket that answers. Without one a stage
does its own imports; the results are the same. Only libraries are imported ahead: a stage always runs the code of
Genus as it is when the stage starts, which is the code that DVC has hashed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

AVAILABLE = hasattr(os, "pidfd_open")  # Linux's
VARIABLE = "GENUS_FORKSERVER"
LIBRARIES = (
    "torch",
    "torch._dynamo",  # the first step of an optimiser imports it
    "safetensors.torch",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.artifact.local_artifact_repo",
    "mlflow.pyfunc",
    "pandas",
    "PIL.Image",
    "ruamel.yaml",
    "scipy.stats",  # it and the next: evaluation and probes, a sixth of the time of small ones
    "sklearn.linear_model",
)
GRACE = 3.0  # seconds that a stage has to end by itself
_GONE = (ProcessLookupError, PermissionError, BrokenPipeError)  # the other process has ended meanwhile
_PR_SET_PDEATHSIG = 1  # Linux's
_LONGEST = 1 << 17  # bytes of a request: arguments and environment


@contextlib.contextmanager
def running(path: Path, environment: dict[str, str]) -> Iterator[Callable[[], float]]:
    """A server whose socket is ``path``, until the block ends, and with this process at the latest.

    Yields a function that ends it and returns the CPU seconds that it took for the imports.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "genus.forkserver", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | environment,
        start_new_session=True,  # Ctrl-C is for the one who started it
    )
    assert process.stdin is not None
    spent: list[float] = []

    def end() -> float:
        if not spent:
            process.stdin.close()  # type: ignore[union-attr]
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            spent.append(usage.ru_utime + usage.ru_stime)
        return spent[0]

    try:
        yield end
    finally:
        end()


def hand_over(arguments: list[str]) -> int | None:
    """Runs ``genus *arguments`` in a fork of the server, with this process's folder, environment and output.

    Returns the exit status; None where no server answers. A signal that ends this process ends the other one first.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    request = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": variables}).encode()
    if len(request) > _LONGEST:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(path)
            socket.send_fds(connection, [request], [0, 1, 2])
        except OSError:  # not ready yet, or gone: nothing has begun
            return None
        try:
            answer = connection.recv(64)
        except (KeyboardInterrupt, SystemExit):
            connection.shutdown(socket.SHUT_WR)
            connection.recv(64)
            raise
    return int(answer) if answer else 128 + signal.SIGKILL


def serve(path: Path) -> list[str] | None:
    """Forks a process a request until standard input ends. Returns in each: the arguments there, None in the server."""
    for library in LIBRARIES:
        if select.select([0], [], [], 0)[0]:  # the one who started it is gone already
            return None
        importlib.import_module(library)
    gc.freeze()  # the collector would touch, and so copy, every page that the forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    aside = path.with_suffix(".new")
    aside.unlink(missing_ok=True)
    listener.bind(str(aside))
    listener.listen(64)
    aside.rename(path)  # whoever sees the name finds a server that listens
    try:
        while True:
            ready, _, _ = select.select([listener.fileno(), 0], [], [])
            if 0 in ready:
                path.unlink(missing_ok=True)
                return None
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                arguments = _supervise(connection)
                if arguments is None:
                    os._exit(0)
                return arguments
            connection.close()
    finally:
        listener.close()


def _supervise(connection: socket.socket) -> list[str] | None:
    """Reads the request and forks the process that is to do it; returns its arguments there, None when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, descriptors, _, _ = socket.recv_fds(connection, _LONGEST, 3)
    if len(descriptors) != 3:
        return None
    request = json.loads(message)
    supervisor, libc = os.getpid(), ctypes.CDLL(None)
    worker = os.fork()
    if not worker:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody would end it where its supervisor is killed
        if os.getppid() != supervisor:
            os._exit(128 + signal.SIGKILL)
        os.setpgid(0, 0)
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        return request["arguments"]
    with contextlib.suppress(*_GONE):
        os.setpgid(worker, worker)  # here too: whichever of the two comes first
    for descriptor in descriptors:
        os.close(descriptor)
    process = os.pidfd_open(worker)
    ready, _, _ = select.select([connection.fileno(), process], [], [])
    if process not in ready:  # the one who asked was told to stop, or is gone
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(*_GONE):
                os.killpg(worker, number)
            if select.select([process], [], [], GRACE)[0]:
                break
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    with contextlib.suppress(*_GONE):
        connection.send(str(status if status >= 0 else 128 - status).encode())
    return None


if __name__ == "__main__":
    arguments = serve(Path(sys.argv[1]))
    if arguments is not None:
        sys.argv = ["genus", *arguments]
        importlib.import_module("genus.cli").main()
