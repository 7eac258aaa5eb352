"""Signed bundles: what is signed is what is served, and nothing else is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from carso.bundle import MANIFEST, SIGNATURE, Bundle, BundleError, sealed
from carso.signing import PublicKey, UnusableKey, sign
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tests.bundles import SMALL, copy_of, shared_bundle
from tests.environments import python_with
from tests.server import serving
from tests.test_settings import start
from tests.waiting import PATIENCE

CURVES = {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "P-521": ec.SECP521R1}
TOOL = "model-signing==1.1.1"


def write_keys(folder: Path, curve: type[ec.EllipticCurve] = ec.SECP256R1) -> Path:
    """Write private.pem and public.pem into a folder, as openssl does."""
    key = ec.generate_private_key(curve())
    folder.mkdir(exist_ok=True)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    (folder / "private.pem").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    return folder


@pytest.fixture
def keys(tmp_path) -> Path:
    return write_keys(tmp_path / "keys")


@pytest.fixture
def bundle(tmp_path, keys) -> Path:
    """A signed copy, to damage."""
    folder = copy_of(shared_bundle(SMALL), tmp_path / "bundle")
    sign(folder, keys / "private.pem")
    return folder


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("CARSO_")}
    words = [sys.executable, "-m", "carso.command", "bundle", *map(str, arguments)]
    return subprocess.run(words, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_a_signed_bundle_is_the_same_bundle(tmp_path, curve):
    keys = write_keys(tmp_path / "keys", curve)
    folder = copy_of(shared_bundle(SMALL), tmp_path / "bundle")
    before = Bundle.load(folder)
    signed_with = sign(folder, keys / "private.pem")
    key = PublicKey.read(keys / "public.pem")
    assert Bundle.load(folder, key=key).checksum == before.checksum
    fingerprint = hashlib.sha256((keys / "public.pem").read_bytes()).hexdigest()  # as sha256sum prints it
    assert key.fingerprint == signed_with.fingerprint == fingerprint


def rewritten(folder: Path, edit: Callable[[dict], object]) -> None:
    """Edit the manifest, and make every checksum right again, as somebody who may write to the folder can."""
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    sealed(folder, {name: value for name, value in manifest.items() if name not in ("schema_version", "files")})


def edit_signature(folder: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads((folder / SIGNATURE).read_text())
    edit(content)
    (folder / SIGNATURE).write_text(json.dumps(content))


def with_payload(folder: Path, edit: Callable[[dict], object]) -> None:
    def changed(content: dict) -> None:
        statement = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
        edit(statement)
        content["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    edit_signature(folder, changed)


def signed_by(folder: Path, curve: type[ec.EllipticCurve] = ec.SECP256R1) -> None:
    sign(folder, write_keys(folder.parent / "others", curve) / "private.pem")


def more_than_was_signed(folder: Path) -> None:
    (folder / "notes.txt").write_text("listed, and not signed")
    rewritten(folder, lambda manifest: None)


def less_than_was_signed(folder: Path) -> None:
    (folder / "vote_int8.onnx").unlink()
    rewritten(folder, lambda manifest: None)


DAMAGE = {
    "no signature": (lambda folder: (folder / SIGNATURE).unlink(), "holds no model.sig, so nobody has signed it"),
    "another key": (signed_by, "was made with the key [0-9a-f]{64}, and the public key that is given is"),
    "another signature": (
        lambda folder: edit_signature(
            folder, lambda content: content["dsseEnvelope"]["signatures"][0].update(sig="MEUCIQ==")
        ),
        "it was altered",
    ),
    "an altered statement": (
        lambda folder: with_payload(folder, lambda it: it["predicate"]["resources"].pop()),
        "it was altered",
    ),
    "no JSON": (lambda folder: (folder / SIGNATURE).write_text("?"), "no signature made with a key"),
    "a certificate instead of a key": (
        lambda folder: edit_signature(folder, lambda it: it.update(verificationMaterial={"certificate": {}})),
        r"no signature made with a key.*verificationMaterial\.publicKey",
    ),
    "no base64": (
        lambda folder: edit_signature(folder, lambda it: it["dsseEnvelope"].update(payload="*")),
        "payload: .*not base64",
    ),
    "a folder for a signature": (
        lambda folder: [(folder / SIGNATURE).unlink(), (folder / SIGNATURE).mkdir()],
        "model.sig cannot be read",
    ),
    "a byte of a graph": (
        lambda folder: (folder / "vote.onnx").write_bytes((folder / "vote.onnx").read_bytes()[:-1] + b"?"),
        "vote.onnx is damaged",
    ),
    "a missing file": (
        lambda folder: (folder / "decoder.safetensors").unlink(),
        "decoder.safetensors is missing",
    ),
    "a changed manifest": (
        lambda folder: rewritten(folder, lambda manifest: manifest.update(samples=9)),
        "manifest.json has changed since it was signed",
    ),
    "a changed graph and manifest": (
        lambda folder: [(folder / "vote.onnx").write_bytes(b"?"), rewritten(folder, lambda manifest: None)],
        "has changed since it was signed",
    ),
    "a file more, in the manifest": (more_than_was_signed, "has changed since|notes.txt is not signed"),
    "a file less, in the manifest": (less_than_was_signed, "has changed since|no longer lists it"),
    "a file more, in the folder": (
        lambda folder: (folder / "samples").mkdir() or (folder / "samples/notes.txt").write_text("not listed"),
        "samples/notes.txt is no file of the bundle, and is not signed",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_bundle_that_is_not_what_was_signed_is_refused(bundle, keys, damage, message):
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle, key=PublicKey.read(keys / "public.pem"))


def test_a_signature_over_something_else_is_refused(bundle, keys):
    key = PublicKey.read(keys / "public.pem")
    digests = Bundle.load(bundle).digests
    for name, digest in (("vote.onnx", None), ("vote.onnx", "0" * 64), ("other.onnx", "0" * 64)):
        found = {**digests, name: digest} if digest else {k: v for k, v in digests.items() if k != name}
        with pytest.raises(BundleError, match=name):
            key.check(bundle, found)


def test_a_new_export_does_not_list_the_old_signature(bundle):
    rewritten(bundle, lambda manifest: None)
    assert SIGNATURE not in Bundle.load(bundle).digests


UNUSABLE = {
    "missing": (None, "cannot be read \\(No such file"),
    "no PEM": (b"?", "holds no (public|private) key in PEM form"),
    "another kind": (ed25519.Ed25519PrivateKey.generate(), "of another kind"),
    "another curve": (ec.generate_private_key(ec.SECP256K1()), "of another kind"),
}


@pytest.mark.parametrize("half", ["private", "public"])
@pytest.mark.parametrize(("key", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_key_that_cannot_be_used_is_refused_by_name(bundle, tmp_path, half, key, message):
    path = tmp_path / f"{half}.pem"
    if isinstance(key, bytes):
        path.write_bytes(key)
    elif key is not None and half == "private":
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    elif key is not None:
        path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UnusableKey, match=message) as caught:
        sign(bundle, path) if half == "private" else PublicKey.read(path)
    assert str(path) in str(caught.value)


def test_a_private_key_with_a_password_is_refused(bundle, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "private.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(UnusableKey, match=r"encrypted.*model_signing sign key"):
        sign(bundle, path)


def test_a_damaged_bundle_is_not_signed(bundle, keys):
    (bundle / SIGNATURE).unlink()
    (bundle / "vote.onnx").write_bytes(b"?")
    with pytest.raises(BundleError, match="is damaged"):
        sign(bundle, keys / "private.pem")
    assert not (bundle / SIGNATURE).exists()


# the commands


def test_the_commands_check_and_sign_a_bundle(tmp_path, keys):
    folder = copy_of(shared_bundle(SMALL), tmp_path / "bundle")
    unsigned = command("verify", folder)
    assert (unsigned.returncode, unsigned.stderr) == (0, "")
    assert unsigned.stdout.splitlines()[-1].split() == ["signature", "none"]
    signed = command("sign", folder, "--private-key", keys / "private.pem")
    assert (signed.returncode, signed.stderr) == (0, "")
    fingerprint = PublicKey.read(keys / "public.pem").fingerprint
    assert fingerprint in signed.stdout
    (folder / "notes.txt").write_text("of nobody")
    unchecked = command("verify", folder)
    assert "notes.txt is no file of the bundle" in unchecked.stdout
    assert "--public-key checks it" in unchecked.stdout
    (folder / "notes.txt").unlink()
    checked = command("verify", folder, "--public-key", keys / "public.pem")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.splitlines()[-1] == f"signature  made with the key {fingerprint}"
    for part in ("checksums", "self-test"):
        assert part in checked.stdout


def test_the_commands_end_with_1_and_a_line_that_names_what_is_wrong(tmp_path, keys, bundle):
    (bundle / SIGNATURE).unlink()
    others = tmp_path / "none.pem"
    for arguments, part in (
        (("verify", bundle, "--public-key", keys / "public.pem"), "nobody has signed it"),
        (("verify", tmp_path), "holds no manifest.json"),
        (("verify", bundle, "--public-key", others), f"{others} cannot be read"),
        (("sign", bundle, "--private-key", others), f"{others} cannot be read"),
    ):
        ended = command(*arguments)
        assert ended.returncode == 1
        assert part in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def test_a_bundle_whose_graphs_give_other_answers_is_not_sound(bundle):
    with np.load(bundle / "self_test.npz") as arrays:
        answers = dict(arrays)
    np.savez(bundle / "self_test.npz", **{**answers, "votes": answers["votes"] ^ 1})
    rewritten(bundle, lambda manifest: None)
    ended = command("verify", bundle)
    assert ended.returncode == 1
    assert "self-test" in ended.stderr


# the service


def test_the_service_says_which_key_it_trusts(bundle, keys, tmp_path):
    fingerprint = PublicKey.read(keys / "public.pem").fingerprint
    with serving(bundle, tmp_path / "log", bundle_public_key=keys / "public.pem") as server:
        assert httpx.get(f"{server.url}/info", timeout=PATIENCE).json()["bundle"]["signed_by"] == fingerprint


def test_without_a_key_nothing_is_said_of_a_signature(client):
    assert client.get("/info").json()["bundle"]["signed_by"] is None


def test_the_service_does_not_start_with_a_bundle_that_nobody_signed(bundle, keys):
    (bundle / SIGNATURE).unlink()
    ended = start(bundle=bundle, device="cpu", bundle_public_key=keys / "public.pem")
    assert ended.returncode == 1
    assert f"{bundle} holds no model.sig" in ended.stderr


def test_the_service_does_not_start_with_a_key_that_cannot_be_read(bundle, tmp_path):
    ended = start(bundle=bundle, device="cpu", bundle_public_key=tmp_path / "none.pem")
    assert ended.returncode == 2
    assert f"CARSO_BUNDLE_PUBLIC_KEY: {tmp_path / 'none.pem'} cannot be read" in ended.stderr


# OpenSSF's own command


@pytest.mark.slow
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_openssfs_command_and_ours_check_each_others_signatures(tmp_path, curve):
    keys = write_keys(tmp_path / "keys", curve)
    folder = copy_of(shared_bundle(SMALL), tmp_path / "bundle")
    key = PublicKey.read(keys / "public.pem")
    # model-signing 1.1.1 imports pyOpenSSL, and does not say so
    tool = [python_with(TOOL, "pyopenssl"), "-m", "model_signing"]
    signature = ("--signature", folder / SIGNATURE)
    check = [*tool, "verify", "key", folder, *signature, "--public_key", keys / "public.pem"]
    sign(folder, keys / "private.pem")
    subprocess.run(check, check=True)
    (folder / "vote.onnx").write_bytes(b"?")
    assert subprocess.run(check, check=False).returncode != 0
    folder = copy_of(shared_bundle(SMALL), tmp_path / "another" / "bundle")
    signature = ("--signature", folder / SIGNATURE)
    subprocess.run([*tool, "sign", "key", folder, *signature, "--private_key", keys / "private.pem"], check=True)
    Bundle.load(folder, key=key)
