"""Signatures of bundles, in the format of OpenSSF Model Signing, so that its command `model_signing` makes them and
checks them too.

The file model.sig in the bundle's folder is a Sigstore bundle: a DSSE envelope round an in-toto statement, which lists
the SHA-256 of every file. The key is an elliptic curve's, P-256, P-384 or P-521, and the signature ECDSA. Sources:
https://github.com/ossf/model-signing-spec, https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, ValidationError

from carso.bundle import SIGNATURE, Bundle, BundleError
from carso.complaints import first_complaint
from carso.settings import Settings, SettingsError

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
HASHES = {"secp256r1": SHA256(), "secp384r1": SHA384(), "secp521r1": SHA512()}  # by curve, as Sigstore pairs them
MAKE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out private.pem"
PASSWORD_HINT = "OpenSSF's own `model_signing sign key` takes one with a password, and writes the same file"  # noqa: S105


class UnusableKey(Exception):  # noqa: N818  says what is wrong
    """A file that does not hold the key that it should. The message names the file."""


def _bytes_of(text: object) -> object:
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else text
    except binascii.Error as e:
        raise ValueError(f"not base64 ({e})") from None


Base64 = Annotated[
    bytes, BeforeValidator(_bytes_of), PlainSerializer(lambda data: base64.b64encode(data).decode(), return_type=str)
]


class _Hint(BaseModel):
    hint: str = ""


class _Material(BaseModel):
    publicKey: _Hint  # noqa: N815  the names are the format's
    tlogEntries: list[Any] = []  # noqa: N815


class _Signature(BaseModel):
    sig: Base64
    keyid: str = ""


class _Envelope(BaseModel):
    payload: Base64
    payloadType: Literal["application/vnd.in-toto+json"] = PAYLOAD_TYPE  # noqa: N815
    signatures: list[_Signature] = Field(min_length=1, max_length=1)


class _File(BaseModel):
    """model.sig."""

    mediaType: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"] = MEDIA_TYPE  # noqa: N815
    verificationMaterial: _Material  # noqa: N815
    dsseEnvelope: _Envelope  # noqa: N815


class _Resource(BaseModel):
    name: str
    algorithm: Literal["sha256"] = "sha256"
    digest: str


class _Serialization(BaseModel):
    method: Literal["files"] = "files"
    hash_type: Literal["sha256"] = "sha256"
    allow_symlinks: bool = False
    ignore_paths: list[str] = [SIGNATURE]


class _Predicate(BaseModel):
    serialization: _Serialization = _Serialization()
    resources: list[_Resource]


class _Digest(BaseModel):
    sha256: str


class _Subject(BaseModel):
    name: str
    digest: _Digest


class _Statement(BaseModel):
    """What is signed."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: list[_Subject] = Field(min_length=1, max_length=1)
    predicateType: Literal["https://model_signing/signature/v1.0"] = "https://model_signing/signature/v1.0"  # noqa: N815
    predicate: _Predicate


@dataclass(frozen=True)
class PublicKey:
    """A key that bundles are checked with."""

    fingerprint: str  # SHA-256 of its PEM file as openssl writes it, which model.sig holds too
    _key: EllipticCurvePublicKey

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Read the PEM file of a public key. Raises UnusableKey."""
        try:
            key = load_pem_public_key(_content(path))
        except (ValueError, UnsupportedAlgorithm):
            raise UnusableKey(
                f"{path} holds no public key in PEM form: write one with `openssl ec -in private.pem -pubout`"
            ) from None
        if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in HASHES:
            raise UnusableKey(f"{path} {_OTHER_KEY}: {MAKE_KEY}")
        return cls.of(key)

    @classmethod
    def of(cls, key: EllipticCurvePublicKey) -> PublicKey:
        """Return what a key of a supported curve checks with."""
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return cls(hashlib.sha256(pem).hexdigest(), key)

    def check(self, folder: Path, digests: Mapping[str, str]) -> None:
        """Raise BundleError unless the bundle in `folder` was signed with this key's private half as it is now.

        `digests`: the SHA-256 of every file of the bundle, as it was read.
        """
        path = folder / SIGNATURE
        content = _signature_file(path)
        self._verify(path, content)
        signed = _statement(path, content.dsseEnvelope.payload)
        for name in sorted(signed.keys() | digests.keys()):
            if name not in signed:
                raise BundleError(f"{folder / name} is not signed by {path}. {_AGAIN}")
            if name not in digests:
                raise BundleError(f"{folder / name} was signed, and the bundle no longer lists it. {_AGAIN}")
            if signed[name] != digests[name]:
                raise BundleError(
                    f"{folder / name} has changed since it was signed: its SHA-256 is {digests[name]}, and {path} says "
                    f"{signed[name]}. {_AGAIN}"
                )

    def _verify(self, path: Path, content: _File) -> None:
        hint = content.verificationMaterial.publicKey.hint
        if hint and hint != self.fingerprint:
            raise BundleError(
                f"{path} was made with the key {hint}, and the public key that is given is {self.fingerprint}. "
                "Give the public key of whoever signs your bundles, or have them sign this one."
            )
        envelope = content.dsseEnvelope
        try:
            self._key.verify(envelope.signatures[0].sig, _pae(envelope.payload), _algorithm(self._key))
        except InvalidSignature:
            raise BundleError(
                f"{path} is not what the key {self.fingerprint} signed: it was altered. {_AGAIN}"
            ) from None


def sign(folder: Path, private_key: Path) -> PublicKey:
    """Sign a bundle: write model.sig into its folder. Returns the public key that checks it.

    Raises UnusableKey; BundleError if the bundle is not sound; OSError if the file cannot be written.
    """
    key = _private_key(private_key)
    public = PublicKey.of(key.public_key())
    digests = Bundle.load(folder).digests
    names = sorted(digests, key=lambda name: Path(name).parts)  # the order of OpenSSF's tool
    root = hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in names)).hexdigest()
    statement = _Statement(
        subject=[_Subject(name=folder.resolve().name, digest=_Digest(sha256=root))],
        predicate=_Predicate(resources=[_Resource(name=name, digest=digests[name]) for name in names]),
    )
    payload = statement.model_dump_json(by_alias=True).encode()
    signature = key.sign(_pae(payload), _algorithm(public._key))
    content = _File(
        verificationMaterial=_Material(publicKey=_Hint(hint=public.fingerprint)),
        dsseEnvelope=_Envelope(payload=payload, signatures=[_Signature(sig=signature)]),
    )
    written = folder / f".{SIGNATURE}"
    written.write_text(content.model_dump_json() + "\n")
    written.replace(folder / SIGNATURE)  # whole, or not at all
    return public


_OTHER_KEY = "holds a key of another kind than those of OpenSSF Model Signing (P-256, P-384, P-521); make one with"
_AGAIN = "Copy the bundle again, or, if it was changed on purpose, sign it again: carso bundle sign"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UnusableKey(f"{path} cannot be read ({e.strerror})") from None


def _private_key(path: Path) -> EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(_content(path), password=None)
    except TypeError:  # it has a password
        raise UnusableKey(f"{path} is encrypted, and is not asked for its password here: {PASSWORD_HINT}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UnusableKey(f"{path} holds no private key in PEM form; make one with: {MAKE_KEY}") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in HASHES:
        raise UnusableKey(f"{path} {_OTHER_KEY}: {MAKE_KEY}")
    return key


def _signature_file(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise BundleError(
            f"{path.parent} holds no {SIGNATURE}, so nobody has signed it. Sign it with: carso bundle sign"
        ) from None
    except OSError as e:
        raise BundleError(f"{path} cannot be read ({e.strerror}). Check the folder and its permissions.") from None
    except ValidationError as e:
        raise BundleError(
            f"{path} is no signature made with a key, in the format of OpenSSF Model Signing ({first_complaint(e)}). "
            "Sign the bundle with: carso bundle sign"
        ) from None


def _statement(path: Path, payload: bytes) -> dict[str, str]:
    """Return the SHA-256 of every file that was signed."""
    try:
        predicate = _Statement.model_validate_json(payload).predicate
    except ValidationError as e:
        raise BundleError(
            f"{path} signs something else than the SHA-256 of each file ({first_complaint(e)}). Sign the bundle with: "
            "carso bundle sign"
        ) from None
    return {resource.name: resource.digest for resource in predicate.resources}


def _pae(payload: bytes) -> bytes:
    """Return what DSSE signs in place of a payload."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _algorithm(key: EllipticCurvePublicKey) -> ECDSA:
    return ECDSA(HASHES[key.curve.name])


def public_key(settings: Settings) -> PublicKey | None:
    """Return the key that signatures of the bundle are checked with; None: they are not. Raises SettingsError."""
    if settings.bundle_public_key is None:
        return None
    try:
        return PublicKey.read(settings.bundle_public_key)
    except UnusableKey as e:
        raise SettingsError(f"{settings.called('bundle_public_key')}: {e}") from None
