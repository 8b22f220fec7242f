"""What text is measured by: each figure against a slow and plain way to the same, or where its value is known."""

from __future__ import annotations

import bz2
import itertools
import json
import math
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from genus.config import Evaluate, Model, Probe, Train
from genus.contract import Batch, Family, Terms
from genus.data.loaders import Dataset
from genus.data.spec import DataSpec
from genus.errors import UserError
from genus.evaluation import constraints, probe, report
from genus.evaluation.evaluate import Task, evaluate
from genus.evaluation.probe import Job, Prober
from genus.evaluation.text import controls, spans
from genus.evaluation.text import evaluate as table
from genus.evaluation.text.bench import Text
from genus.evaluation.text.documents import Documents
from genus.evaluation.text.ngram import NGram
from genus.evaluation.text.quality import copied, distinct, quality, ratio
from genus.evaluation.text.reference import Reference, make_reference, open_reference
from genus.evaluation.text.spans import longest_spans
from tests.evaluation import card as example

CPU = torch.device("cpu")
WORDS = re.findall(r"\w+", "a bird came down the walk he did not know I saw bit an angle worm in halves and ate raw")
SPEC = DataSpec((200,), 0, (), "".join(sorted(set(" ".join(WORDS) + ".\n"))))


def sentences(n: int, seed: int) -> list[str]:
    """Sentences of 4 to 24 words, each word more likely after the one before it in ``WORDS``."""
    random, found = np.random.default_rng(seed), []
    for _ in range(n):
        place, words = int(random.integers(len(WORDS))), []
        for _ in range(int(random.integers(4, 25))):
            words.append(WORDS[place])
            place = (place + 1) % len(WORDS) if random.random() < 0.6 else int(random.integers(len(WORDS)))
        found.append(" ".join(words) + ".")
    return found


def test_some_documents_are_from_all_over_and_fewer_are_the_first_of_more(data: Dataset) -> None:
    whole = Documents.stored(data, "validation").texts(SPEC)
    some, fewer = (Documents.stored(data, "validation", n).texts(SPEC) for n in (60, 10))
    assert Documents.stored(data, "validation", 999).texts(SPEC) == whole and len(some) == 60 and some[:10] == fewer
    places = [whole.index(text) for text in some]
    assert len(set(places)) > 55 and 50 < np.mean(places) < 100


def documents(*texts: str) -> Documents:
    return Documents.of(np.array([*SPEC.tokens(text), 0]) for text in texts)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("text") / "verses"
    (folder / "offsets").mkdir(parents=True)
    for seed, (split, n) in enumerate({"train": 600, "validation": 150, "test": 150}.items()):
        found = documents(*sentences(n, seed))
        np.save(folder / f"{split}.npy", found.tokens.astype(np.uint8))
        np.save(folder / "offsets" / f"{split}.npy", found.offsets)
    return Dataset(folder, SPEC, {"sha256": "ab" * 32})


@pytest.fixture(scope="session")
def reference(data: Dataset) -> Reference:
    return make_reference(data, data.folder.parent / "judge", order=5)


# The n-gram model


def plain(texts: list[list[int]], vocabulary: int, order: int) -> Any:
    """Interpolated modified Kneser-Ney by dictionaries, as Chen & Goodman 1999 write it: log2 of p(token | context)."""
    stream = [0] + [token for text in texts for token in text]
    counts = [Counter(tuple(stream[i : i + n]) for i in range(len(stream) - n + 1)) for n in range(order + 1)]
    for n in range(1, order):
        before: dict[Any, set[int]] = defaultdict(set)
        for gram in counts[n + 1]:
            before[gram[1:]].add(gram[0])
        raw = counts[n]
        counts[n] = Counter({g: raw[g] if n > 1 and g[0] == 0 else len(before[g]) for g in raw})
        counts[n] = Counter({g: c for g, c in counts[n].items() if c})
    discounts = [[0.0] * 4]
    for n in range(1, order + 1):
        n1, n2, n3, n4 = (sum(c == k for c in counts[n].values()) for k in (1, 2, 3, 4))
        if not n1 or not n2 or not n3:
            discounts.append([0, 0.5, 0.5, 0.5])
        else:
            y = n1 / (n1 + 2 * n2)
            d = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            discounts.append([0.0, *(min(max(x, 0.05), k + 0.95) for k, x in enumerate(d))])
    followers: list[dict[Any, list[int]]] = [defaultdict(list) for _ in range(order + 1)]
    for n in range(1, order + 1):
        for gram, count in counts[n].items():
            followers[n][gram[:-1]].append(count)

    def chance(token: int, context: tuple[int, ...]) -> float:
        n = len(context) + 1
        below = chance(token, context[1:]) if context else 1 / vocabulary
        after = followers[n].get(context)
        if not after:
            return below
        d, count = discounts[n], counts[n].get((*context, token), 0)
        left = sum(d[min(c, 3)] for c in after)
        return (count - d[min(count, 3)] + left * below) / sum(after)

    return chance


def test_the_n_gram_model_is_kneser_neys() -> None:
    texts = [[*SPEC.tokens(text), 0] for text in sentences(60, 5)]
    model = NGram.fit(np.concatenate([np.array(text) for text in texts]), SPEC.vocabulary, 4)
    chance = plain(texts, SPEC.vocabulary, 4)
    held_out = documents(*sentences(8, 6), "worm in\n")
    bits = model.bits(held_out.tokens, held_out.offsets)
    slow = []
    for begin, end in itertools.pairwise(held_out.offsets):
        row = [0, *held_out.tokens[begin:end].tolist()]
        slow += [-math.log2(chance(row[i], tuple(row[max(0, i - 3) : i]))) for i in range(1, len(row))]
    assert np.abs(bits - slow).max() < 1e-9
    stream = model.bits(held_out.tokens, np.array([0, len(held_out.tokens)]))
    row = [0, *held_out.tokens.tolist()]
    slow = [-math.log2(chance(row[i], tuple(row[max(0, i - 3) : i]))) for i in range(1, len(row))]
    assert np.abs(stream - slow).max() < 1e-9


def test_n_gram_probabilities_sum_to_one_whatever_came_before(reference: Reference) -> None:
    contexts = np.random.default_rng(0).integers(0, SPEC.vocabulary, (50, 4))
    for reach in range(5):
        assert np.abs(reference.ngram.after(contexts[:, :reach]).sum(1) - 1).max() < 1e-12


def test_a_token_costs_the_same_whatever_follows(reference: Reference) -> None:
    first, second = documents("a bird came", "he saw"), documents("a bird bit.", "worm")
    one, other = (reference.ngram.bits(*found) for found in (first, second))
    assert np.array_equal(one[:7], other[:7]) and one[7] != other[7]
    assert np.array_equal(one[12:], reference.ngram.bits(*documents("he saw"))), "documents are independent"


def test_the_n_gram_model_is_kept(reference: Reference, data: Dataset, tmp_path: Path) -> None:
    reference.ngram.save(tmp_path / "a.safetensors")
    again = NGram.load(tmp_path / "a.safetensors")
    test = Documents.stored(data, "test")
    assert np.array_equal(again.bits(*test), reference.ngram.bits(*test))
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"c\.safetensors: no such file"):
        NGram.load(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="no text"):
        NGram.fit(np.zeros(0, np.uint8), 5)
    assert NGram.fit(np.array([1, 900, 0]), 1000, 8).order == 6, "as many as its keys hold"


def test_the_n_gram_models_samples_are_its_own(reference: Reference) -> None:
    """Their bits a token are its entropy: those of its samples by itself agree over seeds, and are real text's here."""
    rates = []
    for seed in range(3):
        drawn = Documents.drawn(reference.ngram.draw(150, longest=200, random=np.random.default_rng(seed)))
        rates.append(reference.ngram.bits(*drawn).mean())
        first = np.bincount(drawn.tokens[drawn.offsets[:-1]], minlength=SPEC.vocabulary) / 150
        assert np.abs(first - reference.ngram.after(np.zeros((1, 1), np.int64))[0]).max() < 0.12
    assert np.ptp(rates) < 0.1


def test_the_judge_is_read_back_and_belongs_to_its_data(data: Dataset, reference: Reference) -> None:
    folder = data.folder.parent / "judge"
    found = open_reference(data, folder)
    assert found.ngram.order == 5 and np.array_equal(found.spans, reference.spans)
    with pytest.raises(UserError, match="the n-gram model is of other data; `genus judge verses` fits it again"):
        open_reference(Dataset(data.folder, replace(SPEC, alphabet="xyz"), {}), folder)
    with pytest.raises(UserError, match="no n-gram model yet; `genus judge verses` fits it"):
        open_reference(data, folder / "nowhere")


# Figures of samples


@pytest.mark.parametrize("part", [spans.PART, 50])
def test_longest_spans_are_those_of_a_plain_search(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "PART", part)
    train = "".join(f"{text}|" for text in sentences(80, 1))
    texts = [*sentences(12, 2), sentences(80, 1)[7], "", "a", "\n", "the walk he did not know I saw bit an angle worm"]
    slow = []
    for text in texts:
        found = [b - a for a in range(len(text)) for b in range(a + 1, len(text) + 1) if text[a:b] in train]
        slow.append(max(found, default=0))
    tokens = documents(*sentences(80, 1)).tokens.astype(np.uint8)
    assert longest_spans(documents(*texts), tokens).tolist() == slow
    assert slow[12] == len(texts[12]), "a copy is found whole"


def test_distinct_counts_different_n_grams_a_chunk() -> None:
    same, all_new = ["one two three"] * 400, [f"w{i} x{i} y{i}" for i in range(400)]
    found = distinct(same, all_new)
    assert found["distinct_1"]["value"] == 3 / 500 and found["distinct_1"]["floor"] == 1
    assert found["distinct_3"]["value"] == 1 / 200, "chunks as large as there are n-grams for two"
    assert found["distinct_2"]["n"] == 800, "none across the ends of documents"
    assert distinct(all_new, same)["distinct_2"]["value"] == 1
    assert distinct(["one", ""], same) == {}, "no two chunks of anything"


def test_copied_is_zero_by_chance_and_one_for_a_copycat() -> None:
    real = np.arange(100)  # the limit is 95: four of them are above it
    figure = copied(np.array([0, 50, 94] * 40), real, None)
    assert figure["value"] == pytest.approx(-0.04 / 0.96) and "flagged" not in figure
    chance = copied(np.arange(100), real, {"value": 0.0, "high": 0.06})
    assert chance["value"] == pytest.approx(0, abs=1e-9) and not chance["flagged"] and chance["p_value"] > 0.4
    copycat = copied(np.full(100, 200), real, {"value": 0.0, "high": 0.06})
    assert copycat["value"] == 1 and copycat["flagged"] and copycat["p_value"] < 1e-9


def test_the_interval_of_a_rate_counts_documents_by_length() -> None:
    random = np.random.default_rng(0)
    counts, hits = random.integers(5, 50, 400), 0
    for seed in range(60):
        totals = 2.0 * counts + np.random.default_rng(seed + 1).normal(0, np.sqrt(counts))
        found = ratio(totals, counts, seed=seed)
        assert found["value"] == pytest.approx(totals.sum() / counts.sum())
        hits += found["low"] < 2 < found["high"]
    assert 50 <= hits <= 60, "95% of 60 are 57"


def test_each_control_set_is_away_from_real_text_where_its_fault_lies(data: Dataset, reference: Reference) -> None:
    found, real = controls.controls(data, reference, seed=0)
    assert list(found) == list(controls.TITLES) and set(real) <= set(Documents.stored(data, "test").texts(SPEC))
    figures = {name: row["metrics"] for name, row in found.items()}
    assert [name for name, row in figures.items() if row["memorisation"]["flagged"]] == ["copycat"]
    assert figures["one_document"]["distinct_2"]["value"] < 0.1 < figures["held_out"]["distinct_2"]["value"]
    bits = {name: row["ngram_bits"]["value"] - row["ngram_bits"]["floor"] for name, row in figures.items()}
    assert abs(bits["held_out"]) < 0.15 and bits["unigram"] > 2 and bits["copycat"] < 0
    assert figures["copycat"]["copied_span"]["value"] == pytest.approx(
        np.mean([len(text) for text in Documents.stored(data, "train", 600).texts(SPEC)]), rel=0.1
    )
    with pytest.raises(UserError, match="1 documents are too few"):
        quality(documents("a"), data, reference, seed=0)


def test_coders_are_the_libraries_own_and_the_n_gram_model_beats_them(data: Dataset, reference: Reference) -> None:
    found = controls.anchors(data, reference)
    test = Documents.stored(data, "test")
    text = "".join(f"{text}\n" for text in test.texts(SPEC)).encode()
    assert len(text) == len(test.tokens)
    assert found["gzip"]["value"] == 8 * len(zlib.compress(text, 9)) / len(text)
    assert found["bzip2"]["value"] == 8 * len(bz2.compress(text, 9)) / len(text)
    values = {name: row["value"] for name, row in found.items()}
    assert values["xz, primed"] < values["xz"] and values["gzip, primed"] < values["gzip"] < values["unigram"]
    assert values["n-gram"] < min(values[name] for name in ("gzip", "bzip2", "xz", "xz, primed"))
    assert all(row["n"] == 150 for row in found.values())


# A model


class Toy(Family):
    """Every symbol with the same chance, and every document ends with chance 1/20 after each: all is known."""

    paper = "none 0"
    density = "exact"
    kinds = ("text",)
    context = 8

    def __init__(self, spec: DataSpec, wrong: float = 0.0):
        super().__init__(spec)
        self.shift = nn.Parameter(torch.tensor(wrong))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        return {"loss": (self.shift - 1).square() + 0 * batch.x.float().mean()}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        length = (batch.x != 0).sum(1)
        return length * (math.log(0.95) - math.log(len(self.spec.alphabet))) + math.log(0.05) + self.shift

    def sample(self, n: int, *, generator: Generator, cond: Any = None, temperature: float = 1.0) -> Tensor:
        x = torch.randint(1, self.spec.vocabulary, (n, self.spec.shape[0]), generator=generator)
        ends = torch.rand(x.shape, generator=generator) < 0.05 * temperature
        return torch.where(ends.cumsum(1) > 0, 0, x)


def task(model: Any, data: Dataset, reference: Reference, **effort: Any) -> Task:
    return Task(model, data, reference, Evaluate(**({"samples": 60, "batch_size": 25} | effort)), 0, CPU)


def test_a_models_figures_are_what_is_known_of_it(data: Dataset, reference: Reference) -> None:
    figures, timing = evaluate(task(Toy(SPEC), data, reference), table.METRICS)
    test = Documents.stored(data, "test")
    symbols, n = len(test.tokens) - test.n, test.n
    nats = -(symbols * math.log(0.95 / len(SPEC.alphabet)) + n * math.log(0.05))
    found = figures["bits_per_char"]
    assert found["value"] == pytest.approx(nats / math.log(2) / len(test.tokens), rel=1e-6)
    assert (found["kind"], found["n"], found["tokens"]) == ("exact", n, len(test.tokens))
    assert found["low"] < found["value"] < found["high"]
    words = sum(len(text.split()) for text in test.texts(SPEC))
    assert figures["word_perplexity"]["value"] == pytest.approx(math.exp(nats / words), rel=1e-6)
    assert 15 < figures["tokens"]["value"] < 25 and figures["ngram_bits"]["value"] > figures["ngram_bits"]["floor"] + 2
    assert {"distinct_1", "copied_span", "memorisation", "nfe_per_char", "noise_per_char"} <= set(figures)
    assert "bits_per_dim" not in figures and not any("_ms" in name or "second" in name for name in figures)
    assert {"sample_ms", "sample_ms_1", "sample_ms_64", "sample_tokens_per_s", "likelihood_ms"} <= set(timing)
    json.dumps(figures, allow_nan=False)
    again = evaluate(task(Toy(SPEC), data, reference), table.METRICS)[0]
    assert figures == again
    few = evaluate(task(Toy(SPEC), data, reference, likelihoods=20), table.METRICS)[0]["bits_per_char"]
    assert few["n"] == 20 and few["tokens"] == len(Documents.stored(data, "test", 20).tokens)


def test_samples_are_shown_at_three_temperatures_and_a_curve_is_of_the_knobs_named(
    data: Dataset, reference: Reference
) -> None:
    whole = task(Toy(SPEC), data, reference, curve={"temperature": [0.5, 2.0]})
    shown = table.shown(whole)
    assert [part["label"] for part in shown] == ["temperature 0.5", "temperature 0.8", "temperature 1"]
    assert all(len(part["texts"]) == table.SHOWN for part in shown)
    figures, timing = table.knob_curve(whole)
    assert [point["knobs"] for point in figures["curve"]["points"]] == [{"temperature": 0.5}, {"temperature": 2.0}]
    assert len(timing["curve_sample_ms"]) == 2
    with pytest.raises(UserError, match=r"evaluate.curve: \{'heat': 1.0\}: .*heat"):
        table.knob_curve(task(Toy(SPEC), data, reference, curve={"heat": [1.0]}))


def test_a_likelihood_that_is_no_number_is_named(data: Dataset, reference: Reference) -> None:
    with pytest.raises(FloatingPointError, match="log_prob of test document 0 is not finite"):
        table.likelihood(task(Toy(SPEC, math.nan), data, reference))


# The probe


def config(**more: Any) -> Model:
    effort: dict[str, Any] = {"steps": 24, "seeds": 2, "learning_rates": [0.3, 1e9], "widths": [0.5], "outliers": 0.05}
    train = Train(steps=1, batch_size=8, learning_rate=1e-2)
    params = {"hidden": 16, "context": 16, "embedding": 8}
    family = "autoregressive/lstm"
    return Model(
        family=family, dataset="verses", collection="c", params=params, train=train, probe=Probe(**(effort | more))
    )


def test_a_probe_of_text(data: Dataset) -> None:
    made = Prober(config(), data, None, seed=0, device=CPU)
    made.run()
    assert len(made.outcomes) == 2 + 2 + 1 + 2 + 2, "seeds, rates, a width, small batches, outliers; no sizes"
    base = made.outcomes[Job(seed=0)]
    bench = made.bench(0)
    assert base.quality is not None and base.bits == pytest.approx(base.quality * bench.control)  # type: ignore[attr-defined]
    assert base.untrained is not None and base.quality < base.untrained and base.flops > 0 and base.pull is not None
    assert probe.diverged(made.outcomes[Job(learning_rate=1e9)], made.outcomes.values(), bench.scale.lost)
    found = probe.summarise(made)
    assert found["density"]["bits_per_char"]["n"] == 2 and "bits_per_dim" not in found["density"]
    assert found["capacity"]["coverage"] is None and found["capacity"]["resolution_cost"] is None
    assert found["stability"]["outlier_bits"]["n"] == 2
    again = Prober(config(), data, None, seed=0, device=CPU)
    again.run()
    assert json.dumps(found) == json.dumps(probe.summarise(again)), "the same bytes"
    assert probe.setting(made.probe, made)["real_documents"] == 150


def test_the_probes_control_is_the_model_of_pairs(data: Dataset) -> None:
    bench = Text(data, tokens=100_000)
    counts: Counter[tuple[int, int]] = Counter()
    stream = [0, *data.split("train").tolist()]
    counts.update(itertools.pairwise(stream))
    after = Counter(first for first, _ in counts.elements())
    row = [0, *bench.real.tokens.tolist()]
    plainly = [-math.log2(max(counts[pair], 0.5) / after[pair[0]]) for pair in itertools.pairwise(row)]
    assert bench.control == pytest.approx(np.mean(plainly), abs=0.05)
    tokens, _ = bench.train_set(Job(outliers=0.1))
    changed = tokens != bench.tokens
    assert 0.03 < changed.mean() < 0.2 and np.array_equal(tokens == 0, bench.tokens == 0), "ends stay where they are"
    usual, odd = bench.odd(Toy(SPEC), 1, 0, CPU)
    assert torch.equal(usual.x[1:], odd.x[1:]) and not torch.equal(usual.x[0], odd.x[0])
    assert usual.x.shape == (32, 9) and bench.units(usual) == 32 * 8


# Constraints


class Peeking(Family):
    """Predicts a token from the one before; ``inner`` may be anything that sees one token at a time."""

    paper = "none 0"
    density = "exact"
    kinds = ("text",)
    context = 12

    def __init__(self, spec: DataSpec):
        super().__init__(spec)
        self.embedding = nn.Embedding(spec.vocabulary, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, spec.vocabulary)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(x)))

    def loss(self, batch: Batch, *, generator: Generator) -> Terms:
        logits = self.logits(batch.x[:, :-1])
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), batch.x[:, 1:].flatten())}

    def log_prob(self, batch: Batch, *, generator: Generator) -> Tensor:
        before = nn.functional.pad(batch.x, (1, 0))[:, :-1]
        logits = self.logits(before).log_softmax(-1)
        alive = (before == 0).cumsum(1) == 1
        return (logits.gather(2, batch.x.unsqueeze(2)).squeeze(2) * alive).sum(1)

    def sample(self, n: int, *, generator: Generator, cond: Any = None) -> Tensor:
        x = torch.zeros(n, 1, dtype=torch.int64)
        for _ in range(self.spec.shape[0]):
            chance = self.logits(x[:, -1:])[:, 0].softmax(-1)
            x = torch.cat([x, torch.multinomial(chance, 1, generator=generator)], 1)
        ended = (x[:, 1:] == 0).cumsum(1) > 0
        return torch.where(ended, 0, x[:, 1:])


def test_a_place_that_sees_what_comes_is_not_free() -> None:
    """An arbitrary module there looks ahead and learns what it should predict, and its density is none."""
    torch.manual_seed(0)
    found = constraints.free_places_of(Peeking(DataSpec((24,), 0, (), "01")), seed=0)
    assert found["n"] == 1 and found["places"][0]["where"] == "inner"
    assert found["places"][0]["broken"].startswith("its density is none: all probabilities sum to")


def test_all_of_a_text_models_parameters_are_used_by_sampling() -> None:
    found = constraints.trained_share("autoregressive/lstm", {"hidden": 8}, SPEC, seed=0)
    assert found is not None and found["value"] == 1 and found["text"] == "all"
    assert constraints.networks("autoregressive/lstm", {"hidden": 8}, seed=0)["value"] == 1


# The report


def test_text_has_a_part_of_its_own_on_the_page(data: Dataset, reference: Reference, tmp_path: Path) -> None:
    """Beside images: neither's figures are among the other's, and what a model has written is only text."""
    figures, timing = evaluate(task(Toy(SPEC), data, reference), table.METRICS)
    found, real = controls.controls(data, reference, seed=0)
    record = {"name": "verses-toy", "family": "autoregressive/toy", "dataset": "verses", "parameters": 9, "steps": 3}
    record |= {"metrics": figures, "timing": timing | {"train_tokens_per_s": 321.0}}
    record |= {"history": {"step": [1, 2], "loss": [3.0, 2.0], "bits_per_char": [4.3, 2.9]}}
    record |= {"texts": [{"label": "temperature 1", "texts": ["<script>alert(1)</script>\n  deeper", ""]}]}
    known = {
        "kind": "text",
        "alphabet": SPEC.alphabet,
        "counts": {"train": 600, "validation": 150, "test": 150},
        "judge": json.loads((data.folder.parent / "judge/judge.json").read_text()),
        "anchors": controls.anchors(data, reference),
        "controls": found,
        "texts": real,
    }
    records = {**example.records(), "verses-toy": record}
    card = example.card(records, {example.DATASET: example.dataset(), "verses": known})
    images, verses = report.page(card, tmp_path).split('<h2 id="d2-data">')
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n  deeper" in verses and "(nothing)" in verses
    for told in ("bits/char of the test split", "perplexity", "5-gram model", "xz, primed", "test documents", "321"):
        assert told in verses, told
    for title in ("Quality and time", "2-D densities", "Inside the models"):
        assert title in images and title not in verses
    assert "bits/char of the test split" not in images and "training images a second" not in verses
    assert "Fréchet" not in verses.partition('<h2 id="protocol')[0] and "flagged as copying" in verses
    needs = [need["need"] for need in card["advice"] if need["dataset"] == "verses"]
    assert needs.count("best density") == 1 and "most natural samples" in needs
    assert not {"best samples", "fewest constraints"} & set(needs)
    assert not [verdict for verdict in card["verdicts"] if verdict["dataset"] == "verses"], "no claim is of text"
    json.dumps(card, allow_nan=False)
