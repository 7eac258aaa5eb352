"""The command `carso verify`: count again what an answer of /classify says, and tell whether it is the same.

An answer holds all that its count depends on: the bundle's checksum, the options, each image's seed, and the SHA-256 of
each image as it was read. So anybody who has the bundle and the images can check it, without the service.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    import numpy as np

    from carso.bundle import Bundle
    from carso.client.images import Body
    from carso.client.results import RobustPrediction, RobustResult
    from carso.inference.jobs import Certificate, Certify

DIFFERENT = 1
COMPARED = ("label", "class_name", "tally", "votes", "samples", "rule", "risk", "fast_label", "agree")
PROOF = "certified"  # compared where there is one: that eps is proven again, whatever the margin's last digits
ROUND_ROWS = 128  # as the service's default; the outcome does not depend on it
MAX_IMAGES, MAX_PIXELS = 4096, 2**26  # the most that a service may be told to take
INSTALL = "pip install 'carso[cpu]', or give --url to have a service count again"


class Unverifiable(Exception):  # noqa: N818  says what is wrong
    """An answer cannot be counted again here."""


def verify(
    answer: Annotated[Path, typer.Argument(metavar="ANSWER.json", help="A whole answer of /classify.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="The files that were sent, in order.")],
    *,
    bundle: Annotated[
        Path | None,
        typer.Option(envvar="CARSO_BUNDLE", help="Folder of the bundle. Default: the one that comes with the package."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Have this service count again, instead of this machine.")] = None,
) -> None:
    """Count again what an answer says of its images, and prove again what it says is proven.

    Exit status 0: the count is the same. 1: it is another, or it cannot be counted again here.
    """
    from carso import CarsoError
    from carso.errors import RequestError

    try:
        claimed = _receipt(answer)
        found = list(_by_service(claimed, images, url) if url else _by_bundle(claimed, images, bundle))
    except (Unverifiable, CarsoError, RequestError, OSError, ValueError) as e:
        _fail(e)
    except ModuleNotFoundError as e:
        _fail(f"to count again needs {e.name}, which is not installed: {INSTALL}")
    same = True
    for index, (prediction, again) in enumerate(zip(claimed.predictions, found, strict=True)):
        told = {name: getattr(prediction, name) for name in again if name != PROOF}
        if PROOF in again:
            told[PROOF] = None if prediction.certified is None else prediction.certified.eps
        other = [f"{name} {told[name]}, counted {again[name]}" for name in again if told[name] != again[name]]
        same = same and not other
        verdict = f"NOT the same: {'; '.join(other)}" if other else "the same"
        proof = f", proven within {told[PROOF]:g}" if told.get(PROOF) is not None else ""
        typer.echo(f"image {index}: label {told['label']} after {told['votes']} votes{proof}: {verdict}")
    if not same:
        raise typer.Exit(DIFFERENT)


def _receipt(file: Path) -> RobustResult:
    """Read an answer. Raises Unverifiable for what is none of the robust path, or lacks its evidence."""
    from pydantic import ValidationError

    from carso.client.results import RobustResult
    from carso.complaints import first_complaint

    try:
        claimed = RobustResult.model_validate_json(file.read_bytes())
    except ValidationError as e:
        raise Unverifiable(f"{file} is not a whole answer of /classify ({first_complaint(e)})") from None
    if claimed.options is None or claimed.images is None or any(p.seed is None for p in claimed.predictions):
        raise Unverifiable(
            f"{file} has no seeds, options or images: the service withheld its evidence (CARSO_EVIDENCE=label), so "
            "nobody can count again"
        )
    if len(claimed.images) != len(claimed.predictions):
        raise Unverifiable(f"{file} has {len(claimed.predictions)} predictions and {len(claimed.images)} images")
    return claimed


def _by_bundle(claimed: RobustResult, files: list[Path], folder: Path | None) -> Iterator[dict[str, Any]]:
    """Count on this machine's processors. Yields what of COMPARED comes out, of each image."""
    from carso.bundle import Bundle, BundleError
    from carso.client.images import body_of
    from carso.inference.abilities import DeviceError
    from carso.inference.jobs import Job, VotePlan
    from carso.inference.pipeline import Pipeline
    from carso.inference.runtime import InstallationError, check_runtime
    from carso.inference.sessions import Sessions
    from carso.settings import REFERENCE_BUNDLE

    try:
        check_runtime()
        bundle = Bundle.load(folder or REFERENCE_BUNDLE)
        _same_bundle(claimed, bundle.checksum, bundle.manifest.name)
        images = _read(claimed, bundle, body_of(files))
        sessions = Sessions(bundle, device="cpu", precision="int8" if claimed.precision == "int8" else "float32")
    except (BundleError, DeviceError, InstallationError) as e:
        raise Unverifiable(str(e)) from None
    manifest = bundle.manifest
    pipeline = Pipeline(sessions, latent=manifest.latent, classes=len(manifest.classes), round_rows=ROUND_ROWS)
    for image, prediction in zip(images, claimed.predictions, strict=True):
        samples, risk, seed = _plan(prediction)
        certify = _to_prove(prediction, sessions.unproven)
        (result,) = pipeline.run([Job(image[None], VotePlan(samples=samples, risk=risk, seed=seed), certify=certify)])
        (outcome,) = result.outcomes
        tally = outcome.tally
        if prediction.rule == "deadline":  # when it came cannot be counted again, but the votes until then can
            tally = _first_votes(sessions, image, seed, prediction.votes or 0, manifest.latent, len(tally))
        fast_label = int(result.probabilities[0].argmax())
        label = outcome.label if outcome.ending == "certificate" else tally.index(max(tally))
        yield {
            "label": label,
            "class_name": manifest.classes[label],
            "tally": tuple(tally),
            "votes": sum(tally),
            "rule": "deadline" if prediction.rule == "deadline" else outcome.ending,
            "fast_label": fast_label,
            "agree": label == fast_label,
            **_proof(result.certificates),
        }


def _to_prove(prediction: RobustPrediction, unproven: str | None) -> Certify | None:
    """Return what an answer says is proven; None: nothing. Raises Unverifiable if nothing can be proven here."""
    from carso.inference.jobs import Certify

    asked = _asked_again(prediction)
    if asked["certify"] == "off":
        return None
    if unproven is not None:
        raise Unverifiable(f"the answer says that its label is proven, and that cannot be checked: {unproven}")
    return Certify(asked["certify"], asked["certify_eps"])


def _asked_again(prediction: RobustPrediction) -> dict[str, Any]:
    """Return the options that have the proof of an answer made again."""
    if prediction.certified is None:
        return {"certify": "off"}
    decided = prediction.decided_by == "certificate"
    return {"certify": "decide" if decided else "report", "certify_eps": prediction.certified.eps}


def _proof(found: tuple[Certificate | None, ...] | None) -> dict[str, float | None]:
    """Return at which eps the one image is proven; nothing, where the answer says nothing of it."""
    return {} if found is None else {PROOF: None if found[0] is None else found[0].eps}


def _first_votes(sessions: Any, image: np.ndarray, seed: int, votes: int, latent: int, classes: int) -> list[int]:
    """Return the tally of an image's first `votes` votes."""
    import numpy as np

    from carso.inference.latents import Stream

    latents = np.empty((votes, latent), np.float32)
    Stream(seed).draw(out=latents)
    codes = sessions.first_pass(image[None]).codes
    tally: list[int] = np.bincount(sessions.vote(codes, np.zeros(votes, np.int64), latents), minlength=classes).tolist()
    return tally


def _read(claimed: RobustResult, bundle: Bundle, body: Body) -> np.ndarray:
    """Return the images [n, *shape] float32 of an answer. Raises Unverifiable if they are others."""
    from carso.api.answers import digests
    from carso.images import bodies, json_values
    from carso.images.reader import Reader
    from carso.options import ImageOptions

    count, spec = len(claimed.predictions), bundle.manifest.input
    values = json_values.limit(spec.shape)
    parsed = bodies.parse(body.content_type, body.content, max_images=MAX_IMAGES, max_values=values)
    told = claimed.options or {}
    options = ImageOptions(**{name: told[name] for name in ImageOptions.model_fields if name in told})
    images = Reader(spec, max_images=MAX_IMAGES, max_pixels=MAX_PIXELS).read(parsed.sources, options)
    if len(images) != count:
        raise Unverifiable(f"the answer is of {count} images, and the files hold {len(images)}")
    for index, (image, digest) in enumerate(zip(digests(images), claimed.images or (), strict=True)):
        if image != digest:
            raise Unverifiable(
                f"image {index} is not the one of this answer: its SHA-256 is {image}, and the answer has {digest}"
            )
    return images


def _by_service(claimed: RobustResult, files: list[Path], url: str) -> Iterator[dict[str, Any]]:
    """Have a service that allows seeds count, file by file. Yields COMPARED of each image."""
    from carso import Client
    from carso.options import ImageOptions

    if len(files) != len(claimed.predictions):
        raise Unverifiable(
            f"the answer is of {len(claimed.predictions)} images: give a service as many files of one image, or count "
            "with the bundle"
        )
    if any(prediction.rule == "deadline" for prediction in claimed.predictions):
        raise Unverifiable("a deadline ended this count, which no service can repeat: count with the bundle")
    told = dict(claimed.options or {})
    options = {name: told[name] for name in ImageOptions.model_fields if told.get(name) is not None}
    with Client(url) as client:
        for index, (file, prediction) in enumerate(zip(files, claimed.predictions, strict=True)):
            samples, risk, seed = _plan(prediction)
            proof = _asked_again(prediction)
            again = client.classify(file, samples=samples, risk=risk, seed=seed, **proof, **options)
            _same_bundle(claimed, again.bundle.checksum, again.bundle.name)
            if again.images is None or again.images != (claimed.images or ())[index : index + 1]:
                raise Unverifiable(f"image {index} is not the one of this answer, or {url} withholds its evidence")
            (found,) = again.predictions
            counted = {name: getattr(found, name) for name in COMPARED}
            if prediction.certified is not None:
                counted[PROOF] = None if found.certified is None else found.certified.eps
            yield counted


def _plan(prediction: RobustPrediction) -> tuple[int, float, int]:
    """Return samples, risk and seed."""
    if prediction.samples is None or prediction.risk is None or prediction.seed is None:
        raise Unverifiable("a prediction lacks samples, risk or seed")
    return prediction.samples, prediction.risk, prediction.seed


def _same_bundle(claimed: RobustResult, checksum: str, name: str) -> None:
    if claimed.bundle.checksum != checksum:
        raise Unverifiable(
            f"the answer is of bundle {claimed.bundle.name} {claimed.bundle.version} ({claimed.bundle.checksum[:12]}), "
            f"and this is {name} ({checksum[:12]}): give that one"
        )


def _fail(error: object) -> NoReturn:
    typer.echo(f"carso: {error}", err=True)
    raise typer.Exit(DIFFERENT)
