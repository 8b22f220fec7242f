"""Text: what its sources read, and how it becomes tokens."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genus.config import Dataset
from genus.data import documents
from genus.data.ingestion import ingest
from genus.data.loaders import SPLITS, open_dataset
from genus.data.loaders import Dataset as Processed
from genus.data.sources import About, Broken, Document, kjv, open_source
from genus.data.sources._text import cut
from genus.errors import TransientError, UserError
from genus.files import sha256
from tests.data.test_ingestion import content

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog,", "and", "then:", "naïve", "café", "Ωmega"]


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 20))) for _ in range(count)]


def of_text(path: Path, **changes: object) -> Dataset:
    options = {"path": str(path), "documents": "line", "test": 0.1} | changes
    return Dataset(source="text", options=options)


def found(path: Path, **options: object) -> list[Document | Broken]:
    return list(open_source("text", {"path": str(path), **options}).examples())  # type: ignore[arg-type]


def texts(path: Path, **options: object) -> list[str]:
    return [document.text for document in found(path, **options) if isinstance(document, Document)]


# --- files and folders


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("line", ["one", "  two", "three", "four"]),
        ("paragraph", ["one\n  two", "three\nfour"]),
        ("file", ["one\n  two\n\n \n\nthree\nfour"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_a_document_is(tmp_path: Path, kind: str, wanted: list[str], end: str) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbf" + "\n\none\n  two\n\n \n\nthree\nfour\n\n".replace("\n", end).encode()
    )
    assert texts(tmp_path / "a.txt", documents=kind) == wanted
    assert texts(tmp_path, documents=kind) == wanted


def test_files_in_order_without_hidden_ones_and_links(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"of {name}")
    (tmp_path / "c.txt").symlink_to(tmp_path / "b.txt")
    assert texts(tmp_path) == ["of a/y.md", "of a/z.txt", "of b.txt"]
    assert texts(tmp_path, suffix=".txt") == ["of a/z.txt", "of b.txt"]
    assert [document.origin for document in found(tmp_path, suffix=".md")] == ["a/y.md, paragraph 1"]


def test_bad_files_are_put_aside_with_their_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("\n".join(sentences(50)))
    (folder / "latin.txt").write_bytes("first\nsecond\ncafé\n".encode("latin-1"))
    (folder / "torn.txt").write_bytes("x\nΩ".encode()[:-1])
    (folder / "empty.txt").write_bytes(b"\xef\xbb\xbf \n\n")
    broken = {b.origin: b.reason for b in found(folder) if isinstance(b, Broken)}
    assert broken["latin.txt"] == "not UTF-8: byte 0xe9 in line 3" and broken["empty.txt"] == "empty"
    assert broken["torn.txt"].startswith("not UTF-8: byte 0xce in line 2")
    with pytest.raises(UserError, match=r"3 of 53 examples are broken .*the first: empty\.txt: empty"):
        ingest("x", of_text(folder), seed=0, root=tmp_path)
    assert (tmp_path / "quarantine/x/000002-latin.txt").read_bytes() == (folder / "latin.txt").read_bytes()
    with pytest.raises(UserError, match=r"1 of 1 examples are broken .*latin\.txt: not UTF-8: byte 0xe9 in line 3"):
        ingest("y", of_text(folder / "latin.txt"), seed=0, root=tmp_path)


def test_what_is_not_there_empty_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: no such file or folder; .*options\.path says where"):
        open_source("text", {"path": str(tmp_path / "none")}).about()
    with pytest.raises(UserError, match=r"no text in it: no files \*\.txt"):
        open_source("text", {"path": str(tmp_path), "suffix": ".txt"}).about()
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"a\.txt: no text in it: empty"):
        open_source("text", {"path": str(tmp_path / "a.txt")}).about()
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(UserError, match=r"100 bytes of text, more than the option limit, 99"):
        open_source("text", {"path": str(tmp_path / "a.txt"), "limit": 99}).about()
    with pytest.raises(UserError, match="unknown key 'longst': did you mean 'longest'"):
        open_source("text", {"path": "x", "longst": 99})


def test_long_documents_are_cut_between_words_and_nothing_is_lost() -> None:
    document = " ".join(sentences(30)) + "x" * 250 + "\nend"
    for size in (1, 7, 64, 10_000):
        pieces = [document[start : start + size] for start in range(0, len(document), size)]
        parts = list(cut(pieces, 100))
        assert "".join(part for part, _ in parts) == document
        assert [goes_on for _, goes_on in parts] == [False] + [True] * (len(parts) - 1)
        assert all(50 < len(part) <= 100 for part, _ in parts[:-1])
        assert all(part[-1] in " \n" or "xx" in part for part, _ in parts[:-1])
    assert list(cut(["\n\n", "\n"], 100)) == [] and list(cut(["a\n\n"], 100)) == [("a", False)]


def test_a_line_without_end_takes_no_memory_to_speak_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 200_000)
    every = found(tmp_path / "a.txt", documents="line", longest=1000)
    assert len(every) == 1000 and "".join(d.text for d in every if isinstance(d, Document)) == "word " * 200_000


# --- the King James Bible and Python's topics


def bible(folder: Path, verses: int = kjv.VERSES) -> str:
    lines = [f"Ge{number // 50 + 1}:{number % 50 + 1} Verse  number {number}. " for number in range(verses)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kjv.txt").write_text("\n".join(lines) + "\n")
    return "\n".join(lines) + "\n"


def test_verses_are_documents_in_order(tmp_path: Path) -> None:
    bible(tmp_path)
    source = open_source("kjv", {"folder": str(tmp_path)})
    assert source.about().count == 31_102 and source.about().kind == "text"
    verses = list(source.examples())
    assert verses[1] == Document("train", "Verse number 1.", "Ge1:2") and len(verses) == 31_102


def test_a_bible_that_is_none(tmp_path: Path) -> None:
    bible(tmp_path, 100)
    source = open_source("kjv", {"folder": str(tmp_path)})
    with pytest.raises(UserError, match=r"kjv\.txt: 100 verses, expected 31,102; delete it"):
        source.about()
    (tmp_path / "kjv.txt").write_text("Ge1:1 In the beginning\nand so on\n")
    with pytest.raises(UserError, match=r"kjv\.txt: line 2: expected a verse such as"):
        source.about()
    (tmp_path / "kjv.txt").write_bytes(b"Ge1:1 \xff\n")
    with pytest.raises(UserError, match=r"kjv\.txt: cannot be read"):
        source.about()


def test_the_packages_program_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get, dpkg-deb and the program are stood in for by scripts that do what they do."""
    wanted = bible(tmp_path / "given")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "program"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = -p ] && [ -d "$2" ] && [ "$3 $4" = "-f -l9999" ] && cat {tmp_path}/given/kjv.txt\n'
    )
    there = "$3/usr/bin/bible"
    scripts = {
        "apt-get": "while [ $1 != download ]; do shift; done; shift; for p; do echo deb > $p.deb; done",
        "dpkg-deb": f"mkdir -p $3/usr/bin $3/usr/lib && cp {program} {there} && chmod +x {there}",
    }
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    open_source("kjv", {"folder": str(tmp_path / "raw")}).about()
    assert (tmp_path / "raw/kjv.txt").read_text() == wanted


def test_no_packages_says_the_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(TransientError, match=r"kjv\.txt: not there.*put its verses there.*apt-get download") as raised:
        open_source("kjv", {"folder": str(tmp_path / "raw")}).about()
    assert "\n" not in str(raised.value) and not (tmp_path / "raw").exists()


def test_topics_are_paragraphs_each_once() -> None:
    source = open_source("python_docs", {})
    every = [document.text for document in source.examples() if isinstance(document, Document)]
    assert len(every) >= source.about().count > 1000 and 'The "assert" statement' in every[0]
    assert len(set(every)) >= len(every) - 2, "the ends of what was cut may be alike"
    assert all("\n\n" not in text and not text.startswith("\n") for text in every)


# --- tokens


@pytest.fixture
def made(tmp_path: Path) -> tuple[Processed, list[str]]:
    lines = sentences(400)
    (tmp_path / "a.txt").write_text("\n".join(lines))
    ingest("x", of_text(tmp_path / "a.txt"), seed=0, root=tmp_path)
    return open_dataset("x", tmp_path / "processed"), lines


def all_of(data: Processed, split: str) -> list[str]:
    return [data.spec.text(tokens) for tokens in data.documents(split).tolist()]


def test_every_document_comes_back_in_its_order(made: tuple[Processed, list[str]]) -> None:
    data, lines = made
    assert data.description["counts"] == {"train": 324, "validation": 36, "test": 40} and data.description["cut"] == 0
    assert sorted(text for split in SPLITS for text in all_of(data, split)) == sorted(lines)
    for split in SPLITS:
        found = all_of(data, split)
        assert [lines.index(text) for text in found] == sorted(lines.index(text) for text in found)
        assert data.count(split) == len(found) == len(data.labels(split)) and not data.labels(split).any()
    assert data.spec.kind == "text" and data.spec.shape == (max(map(len, lines)) + 1,)
    assert data.spec.alphabet == "".join(sorted(set("".join(lines)))) and "Ω" in data.spec.alphabet


def test_tokens_are_flat_mapped_and_ended(made: tuple[Processed, list[str]]) -> None:
    data, _ = made
    for split in SPLITS:
        tokens, offsets = data.split(split), data.offsets(split)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint8 and tokens.ndim == 1
        assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(tokens)
        assert (np.flatnonzero(tokens == 0) + 1 == offsets[1:]).all()
        assert data.description["tokens"][split] == len(tokens)
    padded = data.documents("test")
    assert padded.shape == (40, data.spec.shape[0])
    assert (data.documents("test", [3, 1]) == padded[[3, 1]]).all()
    assert (data.documents("test", slice(5, 9)) == padded[5:9]).all()
    assert (data.documents("test", np.array([39])) == padded[39:]).all()


def test_table_has_one_row_a_document(made: tuple[Processed, list[str]]) -> None:
    data, _ = made
    table = pd.read_parquet(data.folder / "table.parquet")
    assert list(table.columns) == ["split", "length", "unknown", "control", "sha1"]
    every = [(split, text) for split in SPLITS for text in all_of(data, split)]
    assert list(table["split"]) == [split for split, _ in every]
    assert list(table["length"]) == [len(text) for _, text in every]
    wanted = [hashlib.sha1(bytes([*data.spec.tokens(text), 0])).hexdigest() for _, text in every]
    assert list(table["sha1"]) == wanted and not table[["unknown", "control"]].any(axis=None)


def test_two_ingests_give_the_same_bytes_and_another_seed_another_validation_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(300)))
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        ingest("x", of_text(tmp_path / "a.txt"), seed=seed, root=tmp_path / root)
    a, b, c = (content(tmp_path / root / "processed/x") for root in "abc")
    assert a == b and len(a) == 8 and "spool" not in a
    assert a["validation.npy"] != c["validation.npy"] and a["test.npy"] == c["test.npy"]
    text = (tmp_path / "a/processed/x/dataset.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["kind"] == "text"


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(300)))
    ingest("x", of_text(tmp_path / "a.txt", longest=40), seed=0, root=tmp_path / "a")
    for name, size in (("CHUNK", 100), ("ROW_GROUP", 7)):
        monkeypatch.setattr(documents, name, size)
    ingest("x", of_text(tmp_path / "a.txt", longest=40), seed=0, root=tmp_path / "b")
    a, b = (content(tmp_path / root / "processed/x") for root in "ab")
    assert {**a, "table.parquet": ""} == {**b, "table.parquet": ""}
    frames = [pd.read_parquet(tmp_path / root / "processed/x/table.parquet") for root in "ab"]
    pd.testing.assert_frame_equal(*frames)


class Given:
    """A source that gives what it is told to."""

    def __init__(self, documents: list[Document], least: int = 1):
        self.documents, self.least = documents, least

    def about(self) -> About:
        return About(None, "none", "made up", 0, test=0.1, kind="text", least=self.least)

    def examples(self):  # type: ignore[no-untyped-def]
        yield from self.documents


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Processed]:
    def make(documents: dict[str, list[str]], least: int = 1) -> Processed:
        given = [Document(split, text, split) for split, some in documents.items() for text in some]
        monkeypatch.setattr("genus.data.ingestion.open_source", lambda *_: Given(given, least))
        ingest("x", Dataset(source="given"), seed=0, root=tmp_path)
        return open_dataset("x", tmp_path / "processed")

    return make


def test_the_alphabet_is_of_train_and_the_rest_is_replaced(make: Callable[..., Processed]) -> None:
    plain = make({"train": ["abc", "ab"], "validation": ["a"], "test": ["cab"]})
    assert plain.spec.alphabet == "abc", "no replacement where none is needed"
    strange = make({"train": ["abc", "ab"], "validation": ["aé"], "test": ["cab"]})
    assert strange.spec.alphabet == "abc\ufffd" and all_of(strange, "validation") == ["a\ufffd"]
    rare = make({"train": ["abc", "ab"], "validation": ["a"], "test": ["cab"]}, least=2)
    assert rare.spec.alphabet == "ab\ufffd" and all_of(rare, "train") == ["ab\ufffd", "ab"]
    table = pd.read_parquet(rare.folder / "table.parquet")
    assert list(table["unknown"]) == pytest.approx([1 / 3, 0, 0, 1 / 3])
    with pytest.raises(UserError, match="no symbol is 9 times in the train split; lower the option least"):
        make({"train": ["abc"], "validation": ["a"], "test": ["cab"]}, least=9)


def test_large_alphabets_take_two_bytes(make: Callable[..., Processed]) -> None:
    symbols = "".join(map(chr, range(0x4E00, 0x4E00 + 600))) + "𝔸\0"
    data = make({"train": [symbols], "validation": [symbols[3:5]], "test": [symbols[::-1]]})
    assert data.split("train").dtype == np.uint16 and data.spec.vocabulary == 603
    assert [all_of(data, split) for split in SPLITS] == [[symbols], [symbols[3:5]], [symbols[::-1]]]
    full = make({"train": [symbols[:255]], "validation": ["\u4e01"], "test": ["\u4e02"]})
    assert full.split("train").dtype == np.uint8 and full.split("train").max() == 255
    every = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x14000)]))
    with pytest.raises(UserError, match=r"an alphabet of 79,871 symbols is more than tokens can tell; raise .* least"):
        make({"train": [every], "validation": ["a"], "test": ["b"]})


def test_control_characters_are_counted(make: Callable[..., Processed]) -> None:
    data = make({"train": ["a\n\tb", "a\x07b\x1b"], "validation": ["a"], "test": ["b"]})
    assert list(pd.read_parquet(data.folder / "table.parquet")["control"]) == [0, 0.5, 0, 0]


def test_parts_of_a_document_stay_in_one_split(tmp_path: Path) -> None:
    lines = [f"{number:03d} " * 40 for number in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    description = ingest("x", of_text(tmp_path / "a.txt", longest=50, test=0.2), seed=0, root=tmp_path)
    data = open_dataset("x", tmp_path / "processed")
    assert description["cut"] == 60 and data.spec.shape[0] <= 51
    of = {split: {text[:3] for text in all_of(data, split)} for split in SPLITS}
    assert not (of["train"] & of["test"] or of["train"] & of["validation"] or of["validation"] & of["test"])
    assert len(of["test"]) == 12
    assert "".join(text for split in SPLITS for text in all_of(data, split)).count("0") == "".join(lines).count("0")


def test_too_few_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document\n\nand another")
    with pytest.raises(UserError, match="2 examples are too few: none is left for the validation split"):
        ingest("x", of_text(tmp_path / "a.txt"), seed=0, root=tmp_path)


def test_what_fails_leaves_what_was_there(made: tuple[Processed, list[str]], tmp_path: Path) -> None:
    before = {path: sha256(path) for path in made[0].folder.rglob("*.*")}
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        ingest("x", of_text(tmp_path / "a.txt"), seed=0, root=tmp_path)
    assert {path: sha256(path) for path in made[0].folder.rglob("*.*")} == before
    assert [path.name for path in (tmp_path / "processed").iterdir()] == ["x"]


PEAK = """
import sys
from genus.config import Dataset
from genus.data.ingestion import ingest
for path in sys.argv[2:]:
    ingest("x", Dataset(source="text", options={"path": path, "documents": "line"}), seed=0, root=sys.argv[1])
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_follow_the_length_of_the_text(tmp_path: Path) -> None:
    """4 and then 40 megabytes, as lines of some kilobytes and as a line of 8 megabytes every 10; in one process."""
    line = " ".join(sentences(60))
    some = (line + "\n") * (1_000_000 // len(line.encode()))
    paths = [tmp_path / "4.txt", tmp_path / "40.txt"]
    for path in paths:
        with open(path, "w") as file:
            for megabyte in range(int(path.stem)):
                file.write(some.replace("\n", " ") if megabyte % 10 > 1 else some)
    command = [sys.executable, "-c", PEAK, str(tmp_path), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, long = (int(line) / 1024 for line in done.stdout.split())
    assert long - short < 10, (short, long)
    shutil.rmtree(tmp_path / "processed")
