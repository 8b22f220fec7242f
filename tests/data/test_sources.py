"""Sources: what they read, and how each kind of bad input is said."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genus.data.sources import Broken, Example, fashion_mnist, open_source, source_names
from genus.data.sources._images import Look, Unusable, decode
from genus.data.sources.fashion_mnist import CONTENT, read_idx
from genus.errors import UserError


def png(size: tuple[int, int] = (8, 8), color: object = "red", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "png")  # type: ignore[arg-type]
    return file.getvalue()


def read(path: Path, **options: object) -> tuple[list[Example], list[Broken]]:
    source = open_source("image_folder", {"path": str(path), "size": 8, **options})
    everything = list(source.examples())
    return [e for e in everything if isinstance(e, Example)], [e for e in everything if isinstance(e, Broken)]


def zipped(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


# --- names and options


def test_every_source_is_known() -> None:
    names = "digits factors fashion_mnist image_folder kjv python_docs text torchvision two_d"
    assert source_names() == names.split()


def test_unknown_source_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown source 'fashion-mnist': did you mean 'fashion_mnist'"):
        open_source("fashion-mnist", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "x", "sise": 8}, "unknown key 'sise': did you mean 'size'"),
        ({"path": "x", "size": "8"}, "size: Input should be a valid integer, not '8'"),
        ({"path": "x", "size": 0}, "size: Input should be greater than 0"),
        ({"path": "x", "size": 8, "crop": "center"}, "crop: Input should be 'centre', 'stretch' or 'none'"),
        ({"size": 8}, "path: Field required"),
    ],
)
def test_wrong_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match="options of source 'image_folder'") as raised:
        open_source("image_folder", options)
    assert message in str(raised.value)


# --- Fashion-MNIST


def idx(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small IDX file that passes for one of the four."""
    data = idx(np.random.default_rng(0).integers(0, 256, (25, 4, 4), np.uint8))
    import hashlib

    monkeypatch.setitem(CONTENT, "small", hashlib.sha256(data).hexdigest())
    return data


@pytest.mark.parametrize("packed", [False, True])
def test_idx_is_read_in_parts_packed_or_not(tmp_path: Path, images: bytes, packed: bool) -> None:
    path = tmp_path / ("small.gz" if packed else "small")
    path.write_bytes(gzip.compress(images) if packed else images)
    parts = list(read_idx(path, (4, 4), 10))
    assert [len(part) for part in parts] == [10, 10, 5]
    assert np.concatenate(parts).tobytes() == images[16:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: gzip.compress(data)[:-20], "truncated or damaged"),
        (lambda data: gzip.compress(data[:-20]), "truncated: ends before example 25"),
        (lambda data: data, "Not a gzipped file"),
        (lambda data: gzip.compress(b"hello"), "not an IDX file of bytes"),
        (lambda data: gzip.compress(data[:6]), "not an IDX file|truncated|shape"),
        (lambda data: b"", "not an IDX file of bytes"),
        (lambda data: gzip.compress(data[:-1] + b"\0\0"[:1] + b"x"), "content is not Fashion-MNIST's"),
        (lambda data: gzip.compress(data[:-1] + bytes([data[-1] ^ 1])), "content is not Fashion-MNIST's"),
    ],
)
def test_damaged_idx(tmp_path: Path, images: bytes, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "small.gz"
    path.write_bytes(damage(images))
    with pytest.raises(UserError, match=message) as raised:
        list(read_idx(path, (4, 4), 10))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_idx_of_another_shape(tmp_path: Path, images: bytes) -> None:
    (tmp_path / "small").write_bytes(images)
    with pytest.raises(UserError, match=r"examples of shape \(4, 4\), expected \(28, 28\)"):
        list(read_idx(tmp_path / "small", (28, 28), 10))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mirror answers, and there is no apt-get."""
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_no_network_and_no_copy_says_the_three_ways(tmp_path: Path, offline: None) -> None:
    source = open_source("fashion_mnist", {"folder": str(tmp_path / "raw")})
    with pytest.raises(UserError) as raised:
        source.about()
    message = str(raised.value)
    assert "copy its four .gz files into" in message and "mirror" in message and "apt-get download" in message
    assert "\n" not in message and not (tmp_path / "raw").exists()


def test_what_a_mirror_gives_is_verified_and_kept(
    tmp_path: Path, images: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "CONTENT", {"small": CONTENT["small"]})
    monkeypatch.setattr(fashion_mnist, "_from_package", _fails)
    from torchvision.datasets import FashionMNIST

    (tmp_path / "mirror").mkdir()
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"file://{tmp_path}/none/", f"file://{tmp_path}/mirror/"])
    source = open_source("fashion_mnist", {"folder": str(tmp_path / "raw")})
    (tmp_path / "mirror/small.gz").write_bytes(gzip.compress(images[:-1]))
    with pytest.raises(UserError, match="truncated"):
        source.about()
    assert not (tmp_path / "raw").exists()
    (tmp_path / "mirror/small.gz").write_bytes(gzip.compress(images))
    source.about()
    assert gzip.decompress((tmp_path / "raw/small.gz").read_bytes()) == images
    monkeypatch.setattr(fashion_mnist, "_from_mirrors", _fails)
    source.about()  # from now on the local copy serves


def test_the_package_serves_when_no_mirror_answers(
    tmp_path: Path, images: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt-get and dpkg-deb are stood in for by scripts that do what they do."""
    monkeypatch.setattr(fashion_mnist, "CONTENT", {"small": CONTENT["small"]})
    monkeypatch.setattr(fashion_mnist, "_from_mirrors", _fails)
    (tmp_path / "small.gz").write_bytes(gzip.compress(images))
    unpacked = "$3/usr/share/datasets/fashion-mnist"
    scripts = {
        "apt-get": "for last; do :; done; echo deb > $last.deb",
        "dpkg-deb": f"mkdir -p {unpacked} && cp {tmp_path}/small.gz {unpacked}/",
    }
    for name, script in scripts.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    open_source("fashion_mnist", {"folder": str(tmp_path / "raw")}).about()
    assert gzip.decompress((tmp_path / "raw/small.gz").read_bytes()) == images


def _fails(*_: object) -> dict[str, Path]:
    raise OSError("not to be had")


# --- folders and zips of pictures


def test_folder_with_splits_and_classes(tmp_path: Path) -> None:
    for name in ("train/dog/1.png", "train/cat/2.png", "test/cat/a/3.png", "val/dog/4.PNG", "notes.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    source = open_source("image_folder", {"path": str(tmp_path), "size": 4})
    assert source.about().spec.classes == ("cat", "dog") and source.about().count == 4
    found = [(e.split, e.label, e.origin) for e in source.examples() if isinstance(e, Example)]
    assert found == [
        ("test", 0, "test/cat/a/3.png"),
        ("train", 0, "train/cat/2.png"),
        ("train", 1, "train/dog/1.png"),
        ("validation", 1, "val/dog/4.PNG"),
    ]


def test_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    source = open_source("image_folder", {"path": str(tmp_path), "size": 8, "mode": "L"})
    (example,) = source.examples()
    assert isinstance(example, Example) and example.image.shape == (1, 8, 8) and example.label == 0
    assert source.about().spec.classes == ()


def test_zip_gives_what_the_folder_gives(tmp_path: Path) -> None:
    entries = {"cat/1.png": png(color="blue"), "dog/2.png": png(color="green")}
    plain = zipped(tmp_path / "plain.zip", entries)
    rooted = zipped(tmp_path / "rooted.zip", {f"photos/{name}": data for name, data in entries.items()})
    for name, data in entries.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True)
        (tmp_path / "folder" / name).write_bytes(data)
    wanted, _ = read(tmp_path / "folder")
    for path in (plain, rooted):
        found, broken = read(path)
        assert not broken and [(e.origin, e.label) for e in found] == [("cat/1.png", 0), ("dog/2.png", 1)]
        assert all((a.image == b.image).all() for a, b in zip(found, wanted, strict=True))


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no such folder or zip"), (tmp_path, "no pictures in it")):
        with pytest.raises(UserError, match=message):
            open_source("image_folder", {"path": str(path), "size": 8}).about()


def test_truncated_zip(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": png()})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"x\.zip: not a zip, or truncated"):
        open_source("image_folder", {"path": str(path), "size": 8}).about()


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:\\evil.png"])
def test_zip_paths_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "x.zip", {"fine.png": png(), name: png()})
    with pytest.raises(UserError, match=r"unsafe: its entry '.*evil\.png' leaves the folder"):
        open_source("image_folder", {"path": str(path), "size": 8}).about()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.zip"]


def test_zip_bombs_links_and_damage_are_refused_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    path = zipped(tmp_path / "x.zip", {"bomb.bmp": bytes(10_000_000), "fine.png": png(), "torn.png": png()})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, "/etc/passwd")
    data = bytearray(path.read_bytes())
    data[data.index(b"torn.png") + 50] ^= 255  # inside the compressed picture
    path.write_bytes(data)
    examples, broken = read(path)
    assert [e.origin for e in examples] == ["fine.png"]
    reasons = {b.origin: b.reason for b in broken}
    assert "a zip bomb" in reasons["bomb.bmp"] and "symbolic link" in reasons["link.png"] and reasons["torn.png"]
    monkeypatch.setattr("genus.data.sources.image_folder.MAX_BYTES", 20)
    assert "bytes, more than 20" in {b.origin: b.reason for b in read(path)[1]}["fine.png"]


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.png").write_bytes(png())
    (tmp_path / "in").mkdir()
    (tmp_path / "in/fine.png").write_bytes(png())
    (tmp_path / "in/file.png").symlink_to(tmp_path / "outside/secret.png")
    (tmp_path / "in/folder").symlink_to(tmp_path / "outside")
    examples, broken = read(tmp_path / "in")
    assert [e.origin for e in examples] == ["fine.png"]
    assert [(b.origin, "symbolic link" in b.reason) for b in broken] == [("file.png", True), ("folder", True)]


def test_picture_outside_the_class_folders(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(png())
    (tmp_path / "stray.png").write_bytes(png())
    examples, broken = read(tmp_path)
    assert len(examples) == 1 and broken[0].reason == "in no class folder, where others are"


# --- decoding


def test_size_crop_and_colour() -> None:
    picture = Image.new("RGB", (30, 10), "red")
    picture.paste((0, 0, 255), (10, 0, 20, 10))  # blue in the middle third
    file = io.BytesIO()
    picture.save(file, "png")
    centre = decode(file, Look(size=10, crop="centre"))
    assert centre.shape == (3, 10, 10) and (centre[2] == 255).all() and (centre[0] == 0).all()
    stretched = decode(file, Look(size=10, crop="stretch"))
    assert stretched[0, 5, 0] > 200 and stretched[2, 5, 5] > 200 and stretched[0, 5, 9] > 200
    assert decode(file, Look(size=10, mode="L")).shape == (1, 10, 10)
    with pytest.raises(Unusable, match="30×10 pixels where 10×10 is asked for"):
        decode(file, Look(size=10, crop="none"))


def test_sixteen_bits_transparency_and_orientation() -> None:
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(deep, "png")
    assert (decode(deep, Look(size=8, mode="L")) == 128).all()  # not clipped to 255
    clear = io.BytesIO(png(color=(0, 0, 0, 0), mode="RGBA"))
    assert (decode(clear, Look(size=8)) == 255).all()
    turned = io.BytesIO()
    picture = Image.new("L", (8, 8))
    picture.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(turned, "png", exif=exif)
    assert decode(turned, Look(size=8, mode="L"))[0, 7, 7] == 255


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm"])
def test_any_damage_is_a_reason_and_never_a_crash(kind: str) -> None:
    file = io.BytesIO()
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(file, kind)
    whole = file.getvalue()
    assert decode(io.BytesIO(whole), Look(size=16)).shape == (3, 16, 16)
    for _ in range(200):
        data = bytearray(whole[: generator.integers(0, len(whole))])
        for place in generator.integers(0, max(1, len(data)), 4):
            if data:
                data[place] = generator.integers(0, 256)
        try:
            assert decode(io.BytesIO(bytes(data)), Look(size=16)).shape == (3, 16, 16)
        except Unusable as error:
            assert str(error)


def test_a_program_that_calls_itself_a_picture_is_not_run() -> None:
    with pytest.raises(Unusable, match="not a picture"):
        decode(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), Look(size=8))


# --- torchvision


def test_torchvision_by_class_name() -> None:
    options = {"name": "FakeData", "size": 12, "arguments": {"size": 40, "image_size": [3, 20, 24], "num_classes": 4}}
    source = open_source("torchvision", options)
    about = source.about()
    assert about.spec.shape == (3, 12, 12) and about.spec.classes == ("0", "1", "2", "3") and about.count == 40
    examples = list(source.examples())
    assert all(isinstance(e, Example) and e.split == "train" and 0 <= e.label < 4 for e in examples)


def test_torchvision_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with a split argument: the splits that it has are taken, under our names."""
    from torchvision import datasets

    class Stand:
        def __init__(self, root: str, split: str = "train", download: bool = False):
            if split not in ("train", "val", "test"):
                raise ValueError(f"unknown split {split}")
            self.labels = np.arange({"train": 5, "val": 3, "test": 2}[split]) % 3

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (8, 8), 9), self.labels[index]

    monkeypatch.setattr(datasets, "Flowers102", Stand)
    source = open_source("torchvision", {"name": "Flowers102", "size": 8, "mode": "L", "folder": str(tmp_path)})
    assert source.about().spec.classes == ("0", "1", "2")
    assert [e.split for e in source.examples()] == ["train"] * 5 + ["validation"] * 3 + ["test"] * 2  # type: ignore[union-attr]


def test_torchvision_bad_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set 'CIFAR11': did you mean 'CIFAR10'"):
        open_source("torchvision", {"name": "CIFAR11", "size": 8}).about()
    with pytest.raises(UserError, match="has no argument 'num_clases': did you mean 'num_classes'"):
        open_source("torchvision", {"name": "FakeData", "size": 8, "arguments": {"num_clases": 3}}).about()


def test_torchvision_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserError, match=r"torchvision's CIFAR10 in .*: <urlopen error") as raised:
        open_source("torchvision", {"name": "CIFAR10", "size": 32, "folder": str(tmp_path)}).about()
    assert "\n" not in str(raised.value)
