"""The HTTP status of each error, which is decided here and nowhere else."""

from __future__ import annotations

from carso import errors
from carso.errors import RequestError

_STATUSES: dict[int, tuple[type[RequestError], ...]] = {
    400: (
        errors.UndecodableImage,
        errors.UndecodableJson,
        errors.UndecodableBase64,
        errors.UndecodableNpy,
        errors.UndecodableMultipart,
        errors.MalformedFrame,
        errors.MalformedRequest,
    ),
    401: (errors.Unauthorized,),
    403: (errors.SeedRefused, errors.OriginRefused, errors.EvidenceWithheld),
    404: (errors.NotFound,),
    405: (errors.MethodNotAllowed,),
    408: (errors.RequestTimeout,),
    409: (errors.NearDuplicate,),
    413: (errors.BodyTooLarge, errors.TooManyImages, errors.TooManyPixels),
    415: (errors.UnsupportedMediaType,),
    422: (
        errors.WrongShape,
        errors.NotFinite,
        errors.OutOfRange,
        errors.WrongScale,
        errors.BlankImage,
        errors.EmptyBatch,
        errors.RaggedArray,
        errors.NotNumbers,
        errors.ObjectArray,
        errors.UnsupportedDtype,
        errors.UntypicalImage,
        errors.CannotCertify,
        errors.TransparentImage,
        errors.AnimatedImage,
        errors.UnexpectedPart,
        errors.MissingImages,
        errors.InvalidTensor,
        errors.UnknownOutput,
        errors.UnknownParameter,
        errors.InvalidParameter,
        errors.ConflictingParameters,
    ),
    429: (errors.Overloaded,),
    431: (errors.HeadTooLarge,),
    499: (errors.ClientGone,),
    500: (errors.InternalError, errors.EngineFailed),
    503: (errors.NotReady,),
    504: (errors.DeadlineExceeded,),
}
STATUS: dict[type[RequestError], int] = {kind: status for status, kinds in _STATUSES.items() for kind in kinds}
