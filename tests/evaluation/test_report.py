"""The report: what it says of figures, and the page itself in a real browser."""

from __future__ import annotations

import copy
import itertools
import math
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genus.evaluation import report
from tests.evaluation import card as example

HOSTILE = "</script><script>window.broken=1</script><img src=x onerror=\"window.broken=1\"> 'x' & {{ 7*7 }}"


# What is said of a figure


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "none"),
        (0, "0"),
        (3, "3"),
        (0.21437, "0.214"),
        (41.37, "41.4"),
        (12345.6, "12,346"),
        (1_771_234, "1,771,234"),
        (2.1e10, "21 G"),
        (0.000031, "3.1 × 10⁻⁵"),
        (-0.5, "−0.500"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
        ("iwae-64", "iwae-64"),
    ],
)
def test_numbers_are_told_as_people_read_them(value: Any, told: str) -> None:
    assert report.number(value) == told


def test_a_figure_is_told_to_the_digits_that_its_interval_allows() -> None:
    def told(**figure: Any) -> tuple[str, str]:
        words = report.said(figure)
        return words["value"], words["interval"]

    assert told(value=3.54123, low=3.5312, high=3.5512) == ("3.541", "3.531–3.551")
    assert told(value=391.4, low=352.0, high=430.0) == ("391", "352–430")
    assert told(value=-0.5, low=-0.9, high=-0.1) == ("−0.5", "−0.9 to −0.1")  # no dash between minus signs
    assert told(value=784) == ("784", "")
    assert told(value=0.8, low=None, high=None, open=True) == ("0.800", "no interval")
    assert told(value=0.8, low=0.5, high=None) == ("0.800", "at least 0.500")
    assert report.said(None)["value"] == "none"


def test_arxiv_numbers_of_a_citation_become_addresses() -> None:
    pieces = report.cited("Song & Ermon 2019, 1907.05600; Radford 2015, arXiv 1511.06434")
    assert "".join(text for text, _ in pieces) == "Song & Ermon 2019, 1907.05600; Radford 2015, arXiv 1511.06434"
    assert [url for _, url in pieces if url] == ["https://arxiv.org/abs/1907.05600", "https://arxiv.org/abs/1511.06434"]


def test_the_best_of_a_row_is_marked_and_so_is_what_its_interval_meets() -> None:
    figures = [
        {"value": 1.0, "low": 0.9, "high": 1.1},
        {"value": 1.15, "low": 1.05, "high": 1.25},
        {"value": 3.0, "low": 2.9, "high": 3.1},
        None,
    ]
    assert [cell["mark"] for cell in report._cells(figures, "lower")] == ["best", "tied", "", ""]
    assert [cell["mark"] for cell in report._cells(figures, "higher")] == ["", "", "best", ""]
    assert [cell["mark"] for cell in report._cells(figures, "")] == ["", "", "", ""]
    assert not any(cell["mark"] for cell in report._cells([{"value": 0}, {"value": 0}], "lower"))  # all are equal


@pytest.mark.parametrize("values", [[0.1, 100.0], [3.0, 3.0], [-2.0, 5.0], [0.0], [], [1e-9, 1e9], [math.nan, 2.0]])
def test_an_axis_holds_its_values_and_has_ticks_in_order(values: list[float]) -> None:
    axis = report.Axis.over(values, 0, 100)
    places = [axis.at(value) for value in sorted(value for value in values if math.isfinite(value))]
    assert places == sorted(places) and all(0 <= place <= 100 for place in places)
    ticks = [tick["at"] for tick in axis.ticks()]
    assert len(ticks) >= 2 and ticks == sorted(ticks)


def test_pictures_outside_the_folder_or_that_are_no_pictures_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    Image.new("L", (448, 448)).save(tmp_path / "secret.png")
    (tmp_path / "inside" / "text.png").write_text("not a picture")
    album = report.Album((tmp_path / "inside",))
    assert album.get("..", "secret.png") is None
    assert album.get("text.png") is None and album.get("absent.png") is None
    found = report.Album((tmp_path,)).get("secret.png")
    assert found and (found["width"], found["shown"]) == (448, 224)  # half: pixels stay even


# The page as text


class Tags(HTMLParser):
    """Every element with its attributes, the headings in order, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


def test_the_page_of_the_example_is_made_in_time_and_within_the_limit(tmp_path: Path) -> None:
    card = example.example(tmp_path)
    started = time.monotonic()
    html = report.page(card, tmp_path)
    assert time.monotonic() - started <= 2
    assert len(html.encode()) <= report.LIMIT
    assert html == report.page(card, tmp_path)  # nothing in it but the card


def test_the_page_asks_for_nothing_outside_itself(tmp_path: Path) -> None:
    html = report.page(example.example(tmp_path), tmp_path)
    tags = Tags(html)
    assert all((attrs["src"] or "").startswith("data:image/png;base64,") for attrs in tags.all("img"))
    assert all((attrs["href"] or "").startswith("data:") for attrs in tags.all("link"))
    assert not [attrs for attrs in tags.all("script") if "src" in attrs]
    assert "url(" not in html and "@import" not in html
    outside = {attrs["href"] for attrs in tags.all("a") if not (attrs["href"] or "").startswith("#")}
    assert outside and all(address and address.startswith("https://arxiv.org/abs/") for address in outside)


def test_headings_are_in_order_links_lead_somewhere_and_drawings_have_names(tmp_path: Path) -> None:
    tags = Tags(report.page(example.example(tmp_path), tmp_path))
    levels = [int(name[1]) for name, _ in tags.found if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in tags.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in tags.all("a"):
        if (attrs["href"] or "").startswith("#"):
            assert attrs["href"][1:] in ids, attrs["href"]  # type: ignore[index]
    assert tags.all("svg") and all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in tags.all("svg"))
    for attrs in tags.all("div"):
        if attrs.get("class") == "scroll":
            assert attrs.get("tabindex") == "0" and attrs.get("role") == "region" and attrs.get("aria-label")


def test_every_part_of_the_card_is_on_the_page(tmp_path: Path) -> None:
    card = example.example(tmp_path)
    text = re.sub(r"\s+", " ", Tags(report.page(card, tmp_path)).text)
    for row in card["properties"]:
        assert row["title"] in text
    for verdict in card["verdicts"]:
        assert verdict["claim"] in text
    for entry in card["advice"]:
        assert entry["need"] in text and entry["figure"] in text
    for control in card["datasets"][example.DATASET]["controls"].values():
        assert control["title"] in text
    assert "flagged as copying" in text and "iwae-64" in text and "histogram 4.59" in text
    assert "Missing: Bag" in text
    alts = [attrs["alt"] or "" for attrs in Tags(report.page(card, tmp_path)).all("img")]
    for part in ("Real test images", "Samples drawn", "Interpolation", "Reconstruction", "Trajectory", "Nearest"):
        assert any(alt.startswith(part) for alt in alts), part
    for part in ("True density of rings", "Density of moons", "Images of each control set", "Control set of"):
        assert any(alt.startswith(part) for alt in alts), part


def test_a_failed_model_is_shown_with_its_failure_and_its_text_is_only_text(tmp_path: Path) -> None:
    failed = example.failed(HOSTILE)
    card = example.example(tmp_path, {failed["name"]: failed})
    html = report.page(card, tmp_path)
    tags = Tags(html)
    assert HOSTILE in tags.text  # all of it, as text
    assert len(tags.all("script")) == 1 and not [attrs for _, attrs in tags.found if "onerror" in attrs]
    assert all(name.removeprefix(f"{example.DATASET}-") in tags.text for name in card["models"])


def test_hostile_names_and_texts_everywhere_stay_text(tmp_path: Path) -> None:
    records = example.records()
    first = records.pop(f"{example.DATASET}-glow")
    records[HOSTILE] = first | {"name": HOSTILE, "paper": HOSTILE, "family": HOSTILE}
    card = example.card(records)
    card["about"] = HOSTILE
    card["datasets"][example.DATASET]["anchors"][HOSTILE] = {"value": 4.2, "n": 10, "text": HOSTILE}
    card["verdicts"][0] |= {"claim": HOSTILE, "because": HOSTILE, "source": HOSTILE}
    tags = Tags(report.page(card, tmp_path))
    assert len(tags.all("script")) == 1 and not [attrs for _, attrs in tags.found if "onerror" in attrs]


def _stripped() -> dict[str, dict[str, Any]]:
    """Cards with a part missing, each of which the page has to stand without."""
    records = example.records()
    bare = {name: {key: record[key] for key in ("name", "family", "dataset")} for name, record in records.items()}
    dataset = {example.DATASET: example.dataset() | {"anchors": {}, "controls": {}}}
    no_probe = copy.deepcopy(records)
    for record in no_probe.values():
        del record["probe"], record["history"]
    no_two_d = copy.deepcopy(records)
    for record in no_two_d.values():
        record["probe"] |= {"two_d": {}, "curve": [], "jobs": [], "vary": {}, "constraints": {}}
    failed = example.failed()
    return {
        "no anchors and no controls": example.card(records, dataset),
        "no probes and no histories": example.card(no_probe),
        "no 2-D densities": example.card(no_two_d),
        "nothing measured": example.card(bare),
        "only a failure": example.card({failed["name"]: failed}),
        "an empty card": {},
    }


def test_pictures_may_lie_in_several_folders_the_first_that_has_one_counts(tmp_path: Path) -> None:
    for place, shade in (("first", 10), ("second", 200)):
        (tmp_path / place / "model").mkdir(parents=True)
        Image.new("L", (8, 8), shade).save(tmp_path / place / "model" / "samples.png")
    Image.new("L", (8, 8), 99).save(tmp_path / "second" / "model" / "nearest.png")
    both = report.Album((tmp_path / "first", tmp_path / "second"))
    assert both.get("model", "samples.png") == report.Album((tmp_path / "first",)).get("model", "samples.png")
    assert both.get("model", "nearest.png") is not None


def test_missing_pictures_and_parts_do_not_break_the_page(tmp_path: Path) -> None:
    for what, card in _stripped().items():
        tags = Tags(report.page(card, tmp_path / "nothing"))
        assert "none" in tags.text, what
        assert not tags.all("img"), what
        for name in card.get("models", {}):
            assert name.removeprefix(f"{example.DATASET}-") in tags.text, what


def test_a_capability_that_is_missing_says_none(tmp_path: Path) -> None:
    html = report.page(example.example(tmp_path), tmp_path)
    row = re.search(r'id="row-density\.bits_per_dim".*?</tr>', html, re.DOTALL)
    assert row
    cells = re.findall(r"<td.*?</td>", row.group(), re.DOTALL)
    assert [">none<" in cell for cell in cells] == [False, False, False, True, True]
    assert "dequantised" in cells[1] and "elbo" in cells[2]


def test_the_largest_pictures_are_left_out_of_a_page_that_would_be_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = example.example(tmp_path)
    whole = report.page(card, tmp_path)
    monkeypatch.setattr(report, "LIMIT", len(whole.encode()) - 50_000)
    html = report.page(card, tmp_path)
    assert len(html.encode()) <= report.LIMIT
    largest = max(tmp_path.rglob("*.png"), key=lambda path: path.stat().st_size)
    assert f"Left out: {largest.relative_to(tmp_path)}" in Tags(html).text
    assert 0 < Tags(whole).text.count("Left out") + Tags(html).text.count("Left out") < 5
    assert Tags(html).all("img")  # the small ones are there


def test_two_data_sets_have_a_part_each_and_share_no_anchor(tmp_path: Path) -> None:
    records = example.records()
    other = {
        name.replace(example.DATASET, "digits"): record
        | {"name": name.replace(example.DATASET, "digits"), "dataset": "digits"}
        for name, record in records.items()
    }
    card = example.card(records | other, {example.DATASET: example.dataset(), "digits": example.dataset()})
    tags = Tags(report.page(card, tmp_path))
    ids = [attrs["id"] for _, attrs in tags.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "d2-row-density.bits_per_dim" in ids and "row-density.bits_per_dim" in ids
    assert ids.count("d2-verdicts") == 1


# The page in a browser

CONTRAST = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = new Map();
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || !box.width || ["SCRIPT", "STYLE", "title", "TITLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = numbers(element instanceof SVGElement ? style.fill : style.color), paper = behind(element);
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
    const kind = element.tagName + "." + (element.getAttribute("class") || "");
    found.set(kind, Math.min(found.get(kind) ?? 99, (a + 0.05) / (b + 0.05)));
  }
  return [...found].sort((x, y) => x[1] - y[1]);
}"""


TOO_WIDE = """() => [...document.querySelectorAll("body *")]
  .filter((e) => !e.closest(".scroll, nav, .away, .skip, svg") && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the example with a hostile failure, as a file."""
    folder = tmp_path_factory.mktemp("report")
    failed = example.failed(HOSTILE)
    card = example.example(folder / "pictures", {failed["name"]: failed})
    (folder / "scorecard.html").write_text(report.page(card, folder / "pictures"), encoding="utf-8")
    return (folder / "scorecard.html").as_uri()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Any]:
    """The page in a wide window; the test fails on any error, and on any request but the file itself."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(3000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: wrong.append(asked.url) if asked.url.split("#")[0] != address else None)
    # Pictures within the page are requests of their own to the browser, though not to anybody.
    page.goto(address)
    yield page
    page.close()
    assert not [text for text in wrong if not text.startswith("data:")]


def test_every_picture_is_drawn_and_described(opened: Any) -> None:
    pictures = opened.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.alt, i.complete])")
    assert len(pictures) > 20
    assert all(width > 0 and alt and complete for width, alt, complete in pictures)
    styles = opened.eval_on_selector_all("img", "all => all.map(i => getComputedStyle(i).imageRendering)")
    assert set(styles) == {"pixelated"}


def test_a_hostile_failure_is_inert_and_read_as_it_is(opened: Any) -> None:
    assert HOSTILE in opened.locator("#samples .failure").inner_text()
    assert opened.evaluate("window.broken") is None
    assert opened.locator("#samples .card").count() == 7  # the real images and six models


@pytest.mark.parametrize("way", ["click", "Enter"])
def test_a_head_sorts_the_models_and_says_so(opened: Any, way: str) -> None:
    def names() -> list[str]:
        return opened.locator("table.sortable tbody th").evaluate_all("all => all.map(th => th.dataset.sort)")

    def press(title: str) -> Any:
        button = opened.locator("table.sortable th button", has_text=title)
        if way == "click":
            button.click()
        else:
            button.focus()
            opened.keyboard.press("Enter")
        return button.locator("xpath=..")

    def short(*order: str) -> list[str]:
        return [f"{example.DATASET}-{name}" for name in order]

    before = names()
    head = press("parameters")
    assert head.get_attribute("aria-sort") == "ascending"
    assert names() == short("pixelcnn", "ncsn", "glow", "gan", "vae", "realnvp")  # numbers, not text; none is last
    press("parameters")
    assert head.get_attribute("aria-sort") == "descending"
    assert names() == short("vae", "gan", "glow", "ncsn", "pixelcnn", "realnvp")
    assert press("images/s").get_attribute("aria-sort") == "descending"  # the best first
    assert head.get_attribute("aria-sort") == "none"
    press("model")
    assert names() == sorted(before)
    assert "sorted by model" in opened.locator("[aria-live]").first.inner_text()


def test_verdicts_are_filtered_and_a_link_brings_a_hidden_one_back(opened: Any) -> None:
    shown = opened.locator("#verdicts [data-verdict]:visible")
    total = shown.count()
    button = opened.locator('#verdicts [data-filter="supported"]')
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert 0 < shown.count() < total and str(shown.count()) in button.inner_text()
    assert set(shown.evaluate_all("all => all.map(v => v.dataset.verdict)")) == {"supported"}
    opened.locator('a[href="#claim-1"]').first.click()
    opened.locator("#claim-1").wait_for(state="visible")
    assert shown.count() == total


def test_a_picture_is_enlarged_by_whole_pixels_and_closed_again(opened: Any) -> None:
    opened.locator("#samples button.zoom").first.press("Enter")
    large = opened.locator("dialog img")
    assert large.evaluate("i => i.width / i.naturalWidth") == 1  # 448 pixels fit once into a window of 900
    assert large.get_attribute("alt")
    opened.keyboard.press("Escape")
    assert not opened.locator("dialog").is_visible()


def test_heads_and_first_columns_stay_in_sight(opened: Any) -> None:
    opened.locator('[id="row-speed.nfe"]').scroll_into_view_if_needed()
    box = opened.locator("table.rows thead th").first.bounding_box()
    assert box and 0 <= box["y"] < 450 and opened.locator('[id="row-stability.diverged"]').bounding_box()["y"] < 0
    region = opened.locator("#headline .scroll").first
    left = region.locator("tbody th").first.bounding_box()["x"]
    region.evaluate("r => r.scrollLeft = 300")
    assert region.evaluate("r => r.scrollLeft") > 0  # it does scroll
    assert abs(region.locator("tbody th").first.bounding_box()["x"] - left) <= 1


def test_the_page_does_not_scroll_sideways_on_a_phone(opened: Any) -> None:
    for width in (390, 320, 700, 1000):
        opened.set_viewport_size({"width": width, "height": 844})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.evaluate(TOO_WIDE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(opened: Any, scheme: str) -> None:
    opened.emulate_media(color_scheme=scheme)
    opened.locator("details").evaluate_all("all => all.forEach(d => d.open = true)")
    found = opened.evaluate(CONTRAST)
    assert {"SMALL.", "P.about", "P.read", "A."} <= {kind for kind, _ in found}  # text and muted text were looked at
    assert [(kind, round(ratio, 2)) for kind, ratio in found if ratio < 4.5] == []
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 128")
    assert dark == (scheme == "dark")  # the schemes really differ


def test_translations_have_a_table_and_a_picture(tmp_path: Path) -> None:
    """A row a direction and one for both; a model that draws nothing shows what it has translated."""
    share = {"value": 0.9, "low": 0.88, "high": 0.92, "n": 200, "floor": 0.95, "before": 0.02}
    error = {"value": 0.041, "low": 0.039, "high": 0.043, "n": 200}
    metrics = {
        "translated_accuracy": share
        | {"ways": {"Sneaker to Boot": share | {"value": 0.8123}, "Boot to Sneaker": share}},
        "cycle_error": error | {"ways": {"Sneaker to Boot": error, "Boot to Sneaker": error}},
    }
    name = f"{example.DATASET}-cyclegan"
    record = {"name": name, "family": "gan/cyclegan", "dataset": example.DATASET, "can": ["translates"]}
    (tmp_path / name).mkdir()
    Image.new("L", (40, 24)).save(tmp_path / name / "translation.png")
    card = example.example(tmp_path, {name: record | {"metrics": metrics, "timing": {"translate_ms": 0.7}}})
    tags = Tags(report.page(card, tmp_path))
    assert "From class to class" in tags.text and "Sneaker to Boot" in tags.text and "0.020 before" in tags.text
    assert f"Test images, translated and back, by {name}" in {image.get("alt") for image in tags.all("img")}
    assert "From class to class" not in Tags(report.page(example.example(tmp_path), tmp_path)).text
