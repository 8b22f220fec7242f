"""PostgreSQL, an S3 server and MLflow's upon them, on free ports of 127.0.0.1 for as long as a block lasts."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.servers import free_port, mlflow_server, running

BUCKET = "genus"


def binaries() -> Path | None:
    """Debian's folder of PostgreSQL's programs, which is on nobody's PATH; None where they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[4]))
    return found[-1].parent if found else None


@contextlib.contextmanager
def postgres() -> Iterator[Callable[[str], str]]:
    """A new PostgreSQL; call what it gives with a name to make a database, and get its postgresql:// address.

    It listens on 127.0.0.1 alone, on no socket file, and asks for a random password. As it refuses to run as root,
    root runs it as the user ``postgres``.
    """
    programs = binaries()
    assert programs is not None, "PostgreSQL is not installed"
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="genus-postgres-"))  # not pytest's, which other users cannot enter
    password, port = secrets.token_hex(16), free_port()
    (folder / "password").write_text(password)
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, user, user)

    def call(program: str, *arguments: str) -> None:
        command = [str(programs / program), "--pgdata", str(folder / "data"), *arguments]
        as_user = {"user": user, "group": user, "extra_groups": []} if user else {}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, **as_user)
        log = folder / "log"
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")

    try:
        call("initdb", "--username=genus", f"--pwfile={folder}/password", "--auth=scram-sha-256", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        # Its output goes to a file: a pipe would be held open by the server for as long as it lives.
        call("pg_ctl", "start", "--wait", f"--log={folder}/log", f"--options={options}")
        try:
            yield lambda name: _create_database(f"postgresql://genus:{password}@127.0.0.1:{port}", name)
        finally:
            call("pg_ctl", "stop", "--wait", "--mode=fast")
    finally:
        shutil.rmtree(folder)


def _create_database(address: str, name: str) -> str:
    import psycopg2

    with contextlib.closing(psycopg2.connect(f"{address}/postgres")) as connection:
        connection.autocommit = True
        connection.cursor().execute(f'CREATE DATABASE "{name}"')
    return f"{address}/{name}"


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """moto's S3 server with one empty bucket; gives the environment by which MLflow, DVC and boto3 find it.

    Only that environment: neither the files nor the machine's role, which may hold somebody's real account, is asked.
    """
    import boto3

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
        "AWS_CONFIG_FILE": "/nonexistent/config",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_S3_ENDPOINT_URL": address,
    }
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, address):
        client = boto3.client(
            "s3",
            endpoint_url=address,
            aws_access_key_id="test",
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        yield environment


def keys(prefix: str) -> list[str]:
    """The names of the bucket's objects under a prefix; the environment must be that of ``s3``."""
    import boto3

    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


@contextlib.contextmanager
def mlflow(database: str, environment: dict[str, str]) -> Iterator[str]:
    """MLflow's server with its runs in ``database`` and its artifacts in the bucket; gives its address."""
    with mlflow_server(database, f"s3://{BUCKET}/mlflow", environment) as address:
        yield address
