"""The 2-D source: its table is its density's, its draws are its table's, and it ingests like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from genus.config import Dataset
from genus.data.ingestion import ingest
from genus.data.loaders import open_dataset
from genus.data.sources import open_source, two_d
from genus.data.spec import DataSpec
from genus.errors import UserError


@pytest.fixture(params=two_d.SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("levels", [48, 7, 256])
def test_table_sums_to_one(shape: str, levels: int) -> None:
    table = two_d.truth(shape, levels)
    assert table.shape == (levels, levels) and table.dtype == np.float64
    assert (table >= 0).all() and table.sum() == pytest.approx(1, abs=1e-12)


def test_table_is_the_density_s_mass(shape: str) -> None:
    """Six cells of a 20 × 20 table, heavy and light ones, against adaptive quadrature to 1e-8."""
    levels = 20
    table = two_d.truth(shape, levels)
    edges = np.linspace(-two_d.SIDE, two_d.SIDE, levels + 1)
    heaviest = np.argsort(table.ravel())[::-1]
    for cell in heaviest[[0, 7, 31, 80, 150, 399]]:
        i, j = divmod(int(cell), levels)
        mass, _ = integrate.dblquad(
            lambda y, x: float(two_d.density(shape, np.array([[x, y]]))[0]),
            *edges[i : i + 2],
            *edges[j : j + 2],
            epsabs=1e-8,
        )
        assert table[i, j] == pytest.approx(mass, abs=1e-6)


def test_density_is_one_over_the_square_and_nothing_outside(shape: str) -> None:
    middles = (np.arange(512) + 0.5) / 512 * 2 * two_d.SIDE - two_d.SIDE
    points = np.stack(np.meshgrid(middles, middles, indexing="ij"), -1).reshape(-1, 2)
    assert two_d.density(shape, points).mean() * (2 * two_d.SIDE) ** 2 == pytest.approx(1, abs=1e-6)
    assert (two_d.density(shape, np.array([[4.1, 0.0], [0.0, -5.0]])) == 0).all()
    assert abs(two_d._inside(shape) - 1) < 1e-6, "next to nothing of a shape may be cut off"


def test_finer_tables_add_up_to_coarser_ones(shape: str) -> None:
    fine = two_d.truth(shape, 96).reshape(24, 4, 24, 4).sum((1, 3))
    np.testing.assert_allclose(fine, two_d.truth(shape, 24), atol=1e-12)


def test_draws_match_the_table(shape: str) -> None:
    """Pearson's chi-square over the cells that expect five or more; above its 0.9999 quantile one seed in 10,000."""
    levels, n = 16, 50_000
    table = two_d.truth(shape, levels)
    drawn = two_d.draw(shape, n, levels, seed=3)
    assert drawn.shape == (n, 2, 1, 1) and drawn.dtype == np.uint8
    x, y = drawn[:, :, 0, 0].astype(int).T
    counts, expected = np.bincount(x * levels + y, minlength=levels**2), n * table.ravel()
    assert (counts[expected == 0] == 0).all()
    many = expected >= 5
    found = np.append(counts[many], counts[~many].sum())
    wanted = np.append(expected[many], expected[~many].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    assert ((found - wanted) ** 2 / wanted).sum() < stats.chi2.ppf(0.9999, len(found) - 1)


def test_draws_follow_their_seed(shape: str) -> None:
    first, again, other = (two_d.draw(shape, 100, 64, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_ingests_like_any_source(tmp_path: Path) -> None:
    config = Dataset(source="two_d", options={"shape": "rings", "count": 2000, "levels": 64})
    description = ingest("rings", config, seed=0, root=tmp_path)
    assert description["spec"] == DataSpec((2, 1, 1), levels=64).to_json()
    assert description["counts"] == {"train": 1620, "validation": 180, "test": 200}
    train = np.load(tmp_path / "processed" / "rings" / "train.npy")
    assert train.shape == (1620, 2, 1, 1) and train.max() < 64
    assert ingest("rings", config, seed=0, root=tmp_path / "again")["sha256"] == description["sha256"]


def test_an_ingested_data_set_knows_its_density(tmp_path: Path, shape: str) -> None:
    """By its description alone; the true log-probabilities of its examples have the density's entropy as their mean."""
    ingest(
        shape, Dataset(source="two_d", options={"shape": shape, "count": 20_000, "levels": 48}), seed=0, root=tmp_path
    )
    data = open_dataset(shape, tmp_path / "processed")
    found = two_d.shape_of(data.description)
    assert found == shape
    nats = two_d.log_prob(found, np.asarray(data.split("train")), 48)
    table = two_d.truth(shape, 48)
    entropy = -(table[table > 0] * np.log(table[table > 0])).sum()
    assert nats.shape == (16_200,) and nats.dtype == np.float64 and np.isfinite(nats).all()
    assert abs(-nats.mean() - entropy) < 5 * nats.std() / np.sqrt(len(nats)) + 1e-12
    assert two_d.log_prob(shape, np.full((1, 2, 1, 1), 47, np.uint8), 48)[0] < nats.mean()


def test_other_data_sets_know_none() -> None:
    assert two_d.shape_of({"source": "scikit-learn"}) is None
    assert two_d.shape_of({"source": "rings"}) is None
    assert two_d.shape_of({"source": two_d.SAID + "ring"}) is None


def test_wrong_names_and_options_say_what_would_be_right() -> None:
    with pytest.raises(UserError, match="unknown 2-D shape 'ring': did you mean 'rings'"):
        two_d.truth("ring", 8)
    with pytest.raises(UserError, match="shape: Input should be 'checkerboard', 'eight_gaussians'"):
        open_source("two_d", {"shape": "ring"})
    with pytest.raises(UserError, match="levels: Input should be less than or equal to 256"):
        open_source("two_d", {"shape": "rings", "levels": 300})
    with pytest.raises(ValueError, match="levels must be at most 256"):
        two_d.draw("rings", 1, 300, 0)
    for stored in (np.zeros((3, 2), np.uint8), np.full((3, 2, 1, 1), 16, np.uint8)):
        with pytest.raises(ValueError, match=r"right would be \(2, 1, 1\) and levels below 16"):
            two_d.log_prob("rings", stored, 16)
