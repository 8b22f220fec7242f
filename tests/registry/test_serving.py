"""What `mlflow models serve` answers to a curl: as the card documents it."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from shutil import which

import numpy as np
import pytest

import genus
from genus.registry.pull import pull
from tests.registry.workspace import MODEL, publish, workspace
from tests.servers import model_server

__all__ = ["workspace"]  # a fixture: pytest finds it by its name


def ask(address: str, seeds: list[list[object]], columns: tuple[str, ...] = ("seed",), **params: object):
    """(status, answer) of a request for these rows."""
    body = {"dataframe_split": {"columns": columns, "data": seeds}} | ({"params": params} if params else {})
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/invocations", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, np.array(json.load(answer)["predictions"])
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_served_package_answers_and_refuses(workspace: Path) -> None:
    publish()
    package = pull(MODEL, workspace / "package")
    model = genus.load(MODEL)
    with model_server(package) as address:
        status, images = ask(address, [[3], [1]])
        assert status == 200
        np.testing.assert_array_equal(images, model.sample([3, 1]))
        np.testing.assert_array_equal(ask(address, [[1]])[1][0], images[1])  # whatever else is in the request
        np.testing.assert_array_equal(ask(address, [[3]], temperature=0.8)[1], model.sample([3], temperature=0.8))
        for answer, line in (
            (
                ask(address, [[3]], temprature=0.8),
                "digits-vae has no parameter 'temprature': did you mean 'temperature'?",
            ),
            (ask(address, [[3]], temperature="hot"), "parameter 'temperature' of digits-vae is a number"),
            (ask(address, [[3, 1]], ("seed", "label")), "digits-vae takes no label: it was trained without"),
            (ask(address, [[3, 1]], ("seed", "lable")), "no column 'lable' is known: seed, label"),
            (ask(address, [[3]], ("sead",)), "seed"),
        ):
            assert answer[0] == 400 and line in json.loads(answer[1])["message"], answer
        if which("curl") is None:
            pytest.skip("the documented curl was not run: there is none here")
        shown = re.search(r"^curl .*?\n  -d .*?$", (package / "README.md").read_text(), re.M | re.S)
        assert shown is not None
        command = shown.group().replace("http://127.0.0.1:5001", address)
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
        np.testing.assert_array_equal(json.loads(done.stdout)["predictions"], model.sample([0, 1]))
