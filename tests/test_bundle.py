"""Bundles: what is sealed is what is loaded, and nothing else is."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from carso.bundle import BOUNDS, REQUIRED, VOTE_INT8, Bundle, BundleError, Cell, Threat, sealed

from tests.bundles import COLOUR, SMALL, copy_of, random_images, shared_bundle

FILES = [*REQUIRED, BOUNDS, VOTE_INT8, "classifier.safetensors", "code_encoder.safetensors", "decoder.safetensors"]


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A copy to damage."""
    return copy_of(shared_bundle(), tmp_path / "bundle")


def edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def reseal(folder: Path) -> None:
    """Make every checksum right again: what a damage looks like that was there before the export sealed the folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    sealed(folder, {key: value for key, value in manifest.items() if key not in ("schema_version", "files")})


def self_test_arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "self_test.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("config", [SMALL, COLOUR], ids=["grey", "colour"])
def test_a_bundle_comes_back_as_it_was_sealed(config, tmp_path):
    folder = copy_of(shared_bundle(config), tmp_path / "bundle")
    before = Bundle.load(folder).manifest.model_dump(exclude={"schema_version", "files"})
    changes = {
        "name": "round-trip",
        "version": "1.2.3",
        "samples": 77,
        "recipe": {"epochs": 3, "note": ["any", "JSON"]},
        "table": [
            {
                "defence": "carso",
                "threat": {
                    "attack": "pgd",
                    "norm": "linf",
                    "eps": 0.3,
                    "sees": "classifier",
                    "settings": {"steps": 40, "step_size": 0.01, "start": "uniform"},
                },
                "correct": 9321,
                "images": 10_000,
                "published": 86.27,
            }
        ],
    }
    sealed(folder, before | changes)
    bundle = Bundle.load(folder)
    manifest = bundle.manifest
    assert (manifest.name, manifest.version, manifest.samples) == ("round-trip", "1.2.3", 77)
    assert manifest.input.shape == config.classifier.input_shape
    assert (manifest.code, manifest.latent) == (config.purifier.code, config.purifier.latent)
    assert len(manifest.classes) == config.classifier.classes
    assert manifest.recipe == {"epochs": 3, "note": ["any", "JSON"]}
    cell = manifest.table[0]
    assert cell.accuracy == pytest.approx(93.21)
    assert (cell.kind, cell.threat.name) == ("transfer", "pgd-0.30")
    assert cell.threat.settings == {"steps": 40, "step_size": 0.01, "start": "uniform"}
    assert bundle.first_pass == (folder / "first_pass.onnx").read_bytes()
    assert bundle.vote == (folder / "vote.onnx").read_bytes()
    assert bundle.checksum == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert set(manifest.files) == set(FILES) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    np.testing.assert_array_equal(bundle.self_test.images, random_images(8, config))


SAMPLE = {
    "file": "00000-clean.png",
    "index": 0,
    "label": 9,
    "kind": "none",
    "attack": "none",
    "eps": 0,
    "seed": 1,
    "fast_label": 9,
    "robust_label": 3,
}


def with_samples(bundle: Path, **changes: object) -> Path:
    (bundle / "samples").mkdir()
    (bundle / "samples/00000-clean.png").write_bytes(b"an image")
    described = {"split": "test", "risk": 1e-3, "images": [SAMPLE | changes]}
    (bundle / "samples/samples.json").write_text(json.dumps(described))
    reseal(bundle)
    return bundle


def test_samples_come_back_as_they_were_sealed_and_a_bundle_may_have_none(bundle):
    assert (Bundle.load(bundle).samples, Bundle.load(bundle).sample_files) == (None, {})
    loaded = Bundle.load(with_samples(bundle))
    (sample,) = loaded.samples.images
    assert (sample.label, sample.fast_right, sample.robust_right) == (9, True, False)
    assert loaded.sample_files == {"00000-clean.png": b"an image"}
    (bundle / "samples/00000-clean.png").write_bytes(b"another")
    with pytest.raises(BundleError, match=r"00000-clean\.png is damaged"):
        Bundle.load(bundle)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"file": "another.png"}, "names another.png, which the manifest does not list"),
        ({"file": "../00000-clean.png"}, "should match pattern"),
        ({"robust_label": 10}, "has a class past the last of 10"),
        ({"kind": "white-box"}, "should be 'none', 'transfer' or 'adaptive'"),
    ],
)
def test_samples_that_are_not_as_described_are_refused(bundle, changes, reason):
    with pytest.raises(BundleError, match=rf"samples\.json.*{reason}.*Export the bundle again"):
        Bundle.load(with_samples(bundle, **changes))


def test_a_loaded_bundle_does_not_need_its_folder_any_more(bundle):
    loaded = Bundle.load(bundle)
    for path in bundle.iterdir():
        path.unlink()
    assert loaded.first_pass
    assert loaded.self_test.votes.shape == loaded.self_test.code_index.shape


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_refused(bundle, name):
    path = bundle / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"is damaged: its SHA-256 is .*Copy the bundle again") as e:
        Bundle.load(bundle)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("name", [*REQUIRED, "decoder.safetensors"])
def test_a_missing_file_is_refused(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=r"is missing.*Copy the bundle again") as e:
        Bundle.load(bundle)
    assert str(bundle / name) in str(e.value)


def test_a_folder_without_a_manifest_is_refused_with_the_setting_that_names_another(tmp_path):
    with pytest.raises(BundleError, match=r"holds no manifest\.json.*CARSO_BUNDLE.*carso-train run"):
        Bundle.load(tmp_path)
    with pytest.raises(BundleError, match="CARSO_BUNDLE"):
        Bundle.load(tmp_path / "not there")


def test_a_folder_in_place_of_a_file_is_refused(bundle):
    (bundle / "vote.onnx").unlink()
    (bundle / "vote.onnx").mkdir()
    with pytest.raises(BundleError, match=r"vote\.onnx cannot be read"):
        Bundle.load(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not JSON", b"[" * 100_000], ids=lambda c: repr(c[:8]))
def test_a_manifest_that_is_not_json_is_refused(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not JSON .*Copy the bundle again"):
        Bundle.load(bundle)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_schema_version_is_refused_before_anything_else_is_judged(bundle, version):
    def edit(manifest):
        manifest["schema_version"] = version
        manifest["a field of the future"] = True

    edit_manifest(bundle, edit)
    with pytest.raises(BundleError, match=rf"has schema version {version!r}; this release reads 2") as e:
        Bundle.load(bundle)
    assert str(bundle / "manifest.json") in str(e.value)


def test_a_manifest_that_is_not_an_object_is_refused(bundle):
    (bundle / "manifest.json").write_text("[1]")
    with pytest.raises(BundleError, match="has schema version None"):
        Bundle.load(bundle)


CELL = {
    "defence": "carso",
    "threat": {"attack": "pgd", "norm": "linf", "eps": 0.3, "sees": "classifier", "settings": {}},
    "correct": 5,
    "images": 10,
    "published": None,
}


def with_cell(**changes):
    """Put one cell into a manifest's table, changed; a change of the threat goes by `threat`."""
    threat = CELL["threat"] | changes.pop("threat", {})
    return lambda manifest: manifest.update(table=[CELL | {"threat": threat} | changes])


MANIFEST_DAMAGES = {
    "a cell of schema 1": (lambda m: m.update(table=[{"attack": "clean", "column": "IAT"}]), "table.0"),
    "more correct than images": (with_cell(correct=11), "11 of 10 images"),
    "an unknown norm": (with_cell(threat={"norm": "l7"}), "table.0.threat.norm"),
    "an unknown view": (with_cell(threat={"sees": "everything"}), "table.0.threat.sees"),
    "an attack without eps": (with_cell(threat={"eps": 0.0}), "eps 0.0"),
    "eps is not a number": (with_cell(threat={"eps": "NaN"}), "table.0.threat.eps"),
    "an attack that sees nothing": (with_cell(threat={"sees": "nothing"}), "sees 'nothing'"),
    "a published share, not percent": (with_cell(published=101.0), "table.0.published"),
    "a setting that is a list": (with_cell(threat={"settings": {"steps": [1]}}), "table.0.threat.settings"),
    "a field is missing": (lambda m: m.pop("samples"), "samples"),
    "a field is unknown": (lambda m: m.update(colour="red"), "colour"),
    "one class only": (lambda m: m.update(classes=["0"]), "classes"),
    "no votes": (lambda m: m.update(samples=0), "samples"),
    "two channels": (lambda m: m["input"].update(shape=[2, 8, 8]), "input"),
    "an empty value range": (lambda m: m["input"].update(low=1.0, high=1.0), "input"),
    "no vote graph listed": (lambda m: m["files"].pop("vote.onnx"), "vote.onnx"),
    "a file outside the folder": (lambda m: m["files"].update({"../../etc/passwd": 64 * "0"}), "files"),
    "a file by its absolute path": (lambda m: m["files"].update({"/etc/passwd": 64 * "0"}), "files"),
    "a file in a folder below": (lambda m: m["files"].update({"below/file": 64 * "0"}), "files"),
    "a Windows path": (lambda m: m["files"].update({"..\\file": 64 * "0"}), "files"),
    "the folder above": (lambda m: m["files"].update({"..": 64 * "0"}), "files"),
    "half a checksum": (lambda m: m["files"].update({"vote.onnx": 32 * "0"}), "files"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
def test_an_invalid_manifest_is_refused_by_field(bundle, damage):
    edit, field = MANIFEST_DAMAGES[damage]
    edit_manifest(bundle, edit)
    with pytest.raises(BundleError, match=r"is not a valid manifest.*Export the bundle again") as e:
        Bundle.load(bundle)
    assert str(bundle / "manifest.json") in str(e.value)
    assert field in str(e.value)


KINDS = {
    ("undefended", "classifier"): "white-box",
    ("classifier", "classifier"): "white-box",
    ("classifier", "system"): "transfer",
    ("classifier", "answers"): "black-box",
    ("carso", "classifier"): "transfer",
    ("carso", "system"): "adaptive",
    ("carso", "answers"): "black-box",
    ("another defence", "system"): "adaptive",
    ("another defence", "classifier"): "transfer",
}


@pytest.mark.parametrize(("defence", "sees"), KINDS)
def test_what_an_accuracy_tells_follows_from_the_defence_and_what_the_attacker_sees(defence, sees):
    threat = Threat.model_validate(CELL["threat"] | {"sees": sees})
    cell = Cell(defence=defence, threat=threat, correct=1, images=2, published=None)
    assert cell.kind == KINDS[defence, sees]


def test_a_clean_cell_is_neither_transfer_nor_adaptive():
    threat = Threat(attack="none", norm="linf", eps=0.0, sees="nothing")
    cell = Cell(defence="carso", threat=threat, correct=1, images=2, published=None)
    assert (cell.kind, threat.name) == ("clean", "clean")


@pytest.mark.parametrize(("eps", "name"), [(0.3, "pgd-0.30"), (1.5, "pgd-1.50"), (8 / 255, "pgd-0.0313725")])
def test_a_threat_is_named_by_its_attack_and_eps(eps, name):
    assert Threat.model_validate(CELL["threat"] | {"eps": eps}).name == name


@pytest.mark.parametrize("name", ["images", "latents", "code_index", "probabilities", "codes", "votes", "margins"])
def test_a_self_test_array_of_the_wrong_shape_is_refused_by_name(bundle, name):
    arrays = self_test_arrays(bundle)
    arrays[name] = arrays[name][..., None]
    np.savez(bundle / "self_test.npz", **arrays)
    reseal(bundle)
    with pytest.raises(BundleError, match=rf"self_test\.npz: {name} has shape .*Export the bundle again"):
        Bundle.load(bundle)


def test_a_self_test_that_tests_nothing_is_refused(bundle):
    arrays = self_test_arrays(bundle)
    np.savez(bundle / "self_test.npz", **{name: array[:0] for name, array in arrays.items()})
    reseal(bundle)
    with pytest.raises(BundleError, match=r"self_test\.npz: images has shape \(0,"):
        Bundle.load(bundle)


def test_a_self_test_without_one_of_its_arrays_is_refused(bundle):
    arrays = self_test_arrays(bundle)
    del arrays["votes"]
    np.savez(bundle / "self_test.npz", **arrays)
    reseal(bundle)
    with pytest.raises(BundleError, match=r"is not a self-test .*votes.*Export the bundle again"):
        Bundle.load(bundle)


class Bomb:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("wrapped", [True, False], ids=["an object array", "a bare pickle"])
def test_a_pickle_in_the_self_test_is_refused_and_never_run(bundle, tmp_path, wrapped):
    trace = tmp_path / "trace"
    if wrapped:
        arrays = self_test_arrays(bundle)
        arrays["votes"] = np.array([Bomb(trace)], dtype=object)
        np.savez(bundle / "self_test.npz", **arrays)
    else:
        (bundle / "self_test.npz").write_bytes(pickle.dumps(Bomb(trace)))
    reseal(bundle)
    with pytest.raises(BundleError, match=r"self_test\.npz is not a self-test"):
        Bundle.load(bundle)
    assert not trace.exists()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x03\x04 no zip after all", npy(np.zeros(3))], ids=["empty", "text", "zip", "npy"]
)
def test_a_self_test_of_another_format_is_refused(bundle, content):
    (bundle / "self_test.npz").write_bytes(content)
    reseal(bundle)
    with pytest.raises(BundleError, match=r"self_test\.npz is not a self-test"):
        Bundle.load(bundle)
