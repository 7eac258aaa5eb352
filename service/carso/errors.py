"""What can be wrong with a request, or with the service: one exception type per thing that a caller can act on.

An error is raised where the fact is known. The message says what was wrong, with the value, and what to do. The name in
the answer is the class's own in snake case: WrongShape is ``wrong_shape``. Which HTTP status it gets is decided in
``carso.http.statuses`` and nowhere else.
"""

# ruff: noqa: N818  the names are part of the answers, and each says what is wrong

from __future__ import annotations

import re
from typing import ClassVar


class RequestError(Exception):
    """A request gets another answer than the one it asked for."""

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class UndecodableImage(RequestError):
    """An encoded image that is damaged, truncated, or none of the formats read here."""


class UndecodableJson(RequestError):
    """A body that is not JSON."""


class UndecodableBase64(RequestError):
    """A string among `images` that is not base64."""


class UndecodableNpy(RequestError):
    """A body that is not a whole .npy file, and nothing but one."""


class UndecodableMultipart(RequestError):
    """A multipart body that is damaged or truncated."""


class MalformedFrame(RequestError):
    """A line of a stream that is not a frame."""


class MalformedRequest(RequestError):
    """Bytes that are not an HTTP request."""


class Unauthorized(RequestError):
    """No API key, or an unknown one."""


class SeedRefused(RequestError):
    """The operator does not let callers choose the seed."""


class OriginRefused(RequestError):
    """A page of another origin asks for a WebSocket, and the operator does not let it."""


class EvidenceWithheld(RequestError):
    """The operator withholds what the answer would show."""


class NotFound(RequestError):
    """No such path."""


class MethodNotAllowed(RequestError):
    """The path exists, for another method."""


class RequestTimeout(RequestError):
    """The client took too long to send its body."""


class BodyTooLarge(RequestError):
    """More bytes than the service takes."""


class TooManyImages(RequestError):
    """More images in one request than the service takes."""


class TooManyPixels(RequestError):
    """Encoded images that would decode to more pixels than the service takes in one request."""


class UnsupportedMediaType(RequestError):
    """A Content-Type that is not read here, or none at all."""


class HeadTooLarge(RequestError):
    """A request line, headers or trailers without end."""


class WrongShape(RequestError):
    """An image whose shape is not the bundle's."""


class NotFinite(RequestError):
    """NaN or infinity among the values."""


class OutOfRange(RequestError):
    """A value outside the bundle's range."""


class WrongScale(RequestError):
    """An image whose values use next to nothing of their range, so that it is dark or flat: not scaled, or twice."""


class BlankImage(RequestError):
    """An image whose pixels are all the same."""


class EmptyBatch(RequestError):
    """No image, or an image without pixels."""


class RaggedArray(RequestError):
    """Nested lists of unequal lengths."""


class NotNumbers(RequestError):
    """Something other than numbers where the values of an image should be."""


class ObjectArray(RequestError):
    """A .npy file of Python objects: it holds a pickle, and a pickle runs code."""


class UnsupportedDtype(RequestError):
    """A .npy file of another type than floating point, integers or bool."""


class UntypicalImage(RequestError):
    """An image that is not like those that the bundle knows, where the operator refuses such images."""


class NearDuplicate(RequestError):
    """An image that is nearly one that the same caller sent before, where the operator refuses such images."""


class CannotCertify(RequestError):
    """A proof is asked for, and this bundle has no bounds, or is served where nothing is proven."""


class TransparentImage(RequestError):
    """An image with pixels that let a background show through."""


class AnimatedImage(RequestError):
    """An image file of several frames."""


class UnexpectedPart(RequestError):
    """A multipart part that is not a file."""


class MissingImages(RequestError):
    """A JSON body without a list `images`."""


class InvalidTensor(RequestError):
    """A request of the Open Inference Protocol whose parts do not fit it, or each other."""


class UnknownOutput(RequestError):
    """An output that this model does not have."""


class UnknownParameter(RequestError):
    """An option that this endpoint does not have."""


class InvalidParameter(RequestError):
    """An option whose value is outside its range."""


class ConflictingParameters(RequestError):
    """One option given twice, with different values."""


class Overloaded(RequestError):
    """More work is owed already than the service takes on."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        """`retry_after`: seconds after which the caller may come back."""
        super().__init__(message)
        self.retry_after = retry_after


class ClientGone(RequestError):
    """The client hung up; nobody reads this answer, but the log and the metrics count it."""


class InternalError(RequestError):
    """A fault of the service."""


class EngineFailed(RequestError):
    """The engine has failed while it had this request."""


class NotReady(RequestError):
    """The service takes no work now."""


class DeadlineExceeded(RequestError):
    """The deadline passed before a vote was cast for every image."""
