"""`genus ui` in a real browser: a reviewer finds everything on the pages of a run, of all runs and of the registry."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from genus.stages import register
from tests.registry.workspace import MODEL, passing, workspace, write_figures, write_model, write_params
from tests.servers import free_port, running
from tests.test_tracking import row, runs, start

__all__ = ["passing", "workspace"]  # fixtures
OTHER = "digits-other"


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1280, "height": 1600})
    opened.set_default_timeout(60_000)  # two cores, and others on them
    yield opened
    opened.close()


@pytest.fixture
def trained(workspace: Path, passing: list[Any]) -> None:
    """Two trained models, registered and compared, as `genus run` leaves them in a git repository."""
    Path("dvc.lock").write_text("schema: '2.0'\n")
    subprocess.run("git init -q . && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x", shell=True)
    write_params(MODEL, OTHER)
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params.replace('"smoke"', '"tour"'))  # the default collection
    Path("reports").mkdir()
    Path("reports/scorecard.html").write_text("<h1>The comparison of all models</h1>")
    for seed, model in enumerate((MODEL, OTHER)):
        folder = write_model(model, seed=seed)
        write_figures(model, frechet_distance=40.0 + seed, bits_per_dim=3.5 + seed)
        with start(key=model, model=model, train={"steps": 30, "batch_size": 8}) as run:
            for step in (10, 20, 30):
                run.log(row(step))
                run.image(np.full((64, 64), 8 * step, np.uint8), step)
            run.finished(folder)
    register.run("tour")


class Served(NamedTuple):
    """``genus ui`` on a port of its own, a real MLflow server for the workspace's store."""

    address: str
    pages: dict[str, str]  # what it says when it starts


@pytest.fixture
def server(trained: None) -> Iterator[Served]:
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-c", "from genus.cli import main; main()", "ui", "--port", str(port)]
    with running(command, f"{address}/health", cwd=Path.cwd()) as said:
        yield Served(address, dict(re.findall(r"^(\S.*?) {2,}(http\S+)$", said(), re.MULTILINE)))


def test_a_reviewer_finds_everything(server: Served, page: Any) -> None:
    (run,) = runs(MODEL)
    base, addresses = server
    one = f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert list(addresses) == ["digits", "digits, compared", "registry"]

    def shows(*texts: str) -> None:
        for text in texts:
            page.get_by_text(text).first.wait_for()

    page.goto(one)  # its overview
    shows("test/frechet_distance", "test/bits_per_dim", "train.batch_size", "learning_rate", "genus.dvc_lock_sha256")
    shows(("cd" * 32)[:8], "Finished", run.data.tags["mlflow.source.git.commit"][:6], "genus train", "Compared with")

    page.goto(f"{one}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill("loss|samples")
    shows("samples")
    page.locator(".js-plotly-plot .scatterlayer path.js-line").first.wait_for(state="attached")  # a curve by step
    slider = page.get_by_role("slider").last
    slider.focus()
    seen = []
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        step = slider.get_attribute("aria-valuenow")
        picture = page.locator(f'img[src*="step%2B{step}%2B"]').first
        picture.wait_for()
        page.wait_for_function("picture => picture.naturalWidth > 0", arg=picture.element_handle())
        seen.append(step)
    assert seen == ["10", "20", "30"]

    page.goto(f"{one}/artifacts")
    shows("history.csv", "model.json", "images")
    page.get_by_text("model_card.md").first.click()
    page.get_by_role("heading", name="On the test split").wait_for()
    page.get_by_text("report", exact=True).first.click()
    page.get_by_text("scorecard.html").first.click()
    page.frame_locator("iframe").get_by_text("The comparison of all models").wait_for()

    page.goto(addresses["registry"])
    page.get_by_text(MODEL, exact=True).first.wait_for()
    champions = page.get_by_role("row").filter(has_text="champion")
    champions.nth(1).wait_for()
    assert {MODEL, OTHER} == {line.split()[0] for line in champions.all_inner_texts()}
    page.goto(f"{base}/#/models/{MODEL}/versions/1")
    shows("champion", "Gate: champion (first)", "genus.data_sha256")

    page.goto(addresses["digits, compared"])
    shows("test/bits_per_dim", MODEL, OTHER)
    for value in ("3.50", "4.50"):  # a bar each
        page.locator(".js-plotly-plot").get_by_text(value).first.wait_for(state="attached")
