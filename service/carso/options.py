"""Request options: how many votes, which seed, which risk, until when.

Callers give them as query parameters, or in a JSON body beside `images`, or both as long as they agree.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, create_model

from carso.choices import DEFAULT_EPS, LEAST_EPS, MAX_SEED, Certifying, Fit, Risk
from carso.complaints import complaint, shown
from carso.errors import ConflictingParameters, InvalidParameter, UnknownParameter

MAX_DEADLINE_MS = 600_000
MAX_PARAMETERS = 64  # of a query: each costs time to check


COLOUR = "[0-9A-Fa-f]{6}"  # RRGGBB
Background = Annotated[
    str,
    Field(pattern=rf"\A(black|white|{COLOUR})\z"),
    WithJsonSchema({"anyOf": [{"enum": ["black", "white"]}, {"type": "string", "pattern": f"^{COLOUR}$"}]}),
]


class ImageOptions(BaseModel):
    """How images are made into what the bundle takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: bool = Field(
        default=False,
        description="Scale encoded images of another height and width to the bundle's, instead of refusing them. "
        "Arrays are never scaled.",
    )
    fit: Fit = Field(
        default="pad",
        description="How `resize` treats other proportions. pad: keep them, and fill two sides with the bundle's "
        "background; stretch: do not keep them.",
    )
    invert: bool = Field(
        default=False,
        description="Turn every value round in its range, as for dark ink on white paper where the bundle takes bright "
        "ink on black.",
    )
    background: Background | None = Field(
        default=None,
        description="What transparent pixels of encoded images show, before `invert`: black, white, or a colour as "
        "RRGGBB. Default: transparent images are refused.",
    )


class FastOptions(ImageOptions):
    """The options of /classify/fast. `fast_options` puts in the defaults of one service."""

    certify: Certifying = Field(
        default="off",
        description="What to prove: that every image which differs from this one by at most an eps in every value gets "
        "the same label from the first pass. It does not prove that the label is right, and says nothing of the vote, "
        "of other changes or of a larger eps. report: at `certify_eps`. max: at the largest eps that is found. decide: "
        "as report, and on /classify a proven label is the answer, without a vote.",
    )
    certify_eps: float = Field(
        default=DEFAULT_EPS, ge=LEAST_EPS, le=1, description="The eps of `certify`, in units of the values of images."
    )


class RobustOptions(FastOptions):
    """The options of /classify. `robust_options` puts in the defaults and limits of one service."""

    samples: int = Field(ge=1, description="Votes to count per image, at most.")
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the latents; the same image, options and seed get the same votes whatever else the "
        "service does. Default: a fresh one per image from the operating system. The operator may refuse it (403).",
    )
    risk: Risk = Field(
        description="Chance that early stopping elects another class than the full count of `samples` votes would; "
        "0: stop only when the outcome is certain. It is about the count, not about adversarial robustness."
    )
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        le=MAX_DEADLINE_MS,
        description="Milliseconds after the request's arrival at which counting stops and the votes cast so far decide "
        '(rule "deadline"); with none cast for an image, the answer is 504. Default: none.',
    )


class StreamOptions(FastOptions):
    """The options of /classify/stream. `robust_options` puts in the defaults and limits of one service."""

    rate: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Chance that a frame is drawn for the robust answer, whatever it shows and whatever the load is.",
    )
    max_rate: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="What that chance rises to while the engine is idle, and the budget full. Default: 1 with a "
        "`budget`, and `rate` without one.",
    )
    margin: float = Field(
        default=0,
        ge=0,
        le=1,
        description="Frames whose two most probable classes differ by less on the fast path get the robust answer too.",
    )
    untypical: bool = Field(
        default=False,
        description="Frames that are not like the images that the bundle knows get the robust answer too. It needs a "
        "service that looks at this on the fast path (CARSO_TYPICAL=all).",
    )
    uncertified: bool = Field(
        default=False,
        description="Frames of which nothing is proven at `certify_eps` get the robust answer too. It needs `certify`.",
    )
    budget: float | None = Field(
        default=None,
        ge=1,
        le=1e9,
        description="Votes per second that the stream may take, over ten seconds. Default: as many as are chosen.",
    )
    samples: int = Field(ge=1, description=RobustOptions.model_fields["samples"].description)
    risk: Risk = Field(description=RobustOptions.model_fields["risk"].description)
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        le=MAX_DEADLINE_MS,
        description="As of /classify, counted from the arrival of each frame. A frame may have one of its own.",
    )


Options = TypeVar("Options", bound=FastOptions)


MAX_EXPLAINED = 8  # images of one request


class ExplainedOptions(RobustOptions):
    """The options of /classify, whose answers may hold pictures; tensors of the other protocol do not."""

    explain: bool = Field(
        default=False,
        description="Show what the votes were cast on: purified images as PNG, and what the first pass saw. For at "
        f"most {MAX_EXPLAINED} images. The operator may refuse it (403).",
    )


Robust = TypeVar("Robust", RobustOptions, ExplainedOptions, StreamOptions)


def fast_options(*, certify: Certifying, certify_eps: float) -> type[FastOptions]:
    """Return FastOptions with the operator's defaults."""
    return create_model("FastOptions", __base__=FastOptions, **_certified(certify, certify_eps))


def robust_options(
    base: type[Robust],
    *,
    samples: int,
    max_samples: int,
    risk: float,
    certify: Certifying = "off",
    certify_eps: float = DEFAULT_EPS,
) -> type[Robust]:
    """Return the options `base` with the bundle's `samples`, and the operator's limit and defaults."""
    fields = RobustOptions.model_fields
    return create_model(
        base.__name__,
        __base__=base,
        samples=(int, Field(default=samples, ge=1, le=max_samples, description=fields["samples"].description)),
        risk=(Risk, Field(default=risk, description=fields["risk"].description)),
        **_certified(certify, certify_eps),
    )


def _certified(certify: Certifying, eps: float) -> dict[str, Any]:
    fields = FastOptions.model_fields
    return {
        "certify": (Certifying, Field(default=certify, description=fields["certify"].description)),
        "certify_eps": (float, Field(default=eps, ge=LEAST_EPS, le=1, description=fields["certify_eps"].description)),
    }


def parse(model: type[Options], query: bytes, body: dict[str, Any]) -> Options:
    """Return the options in a query string and in a JSON body (without its `images`).

    Raises UnknownParameter, InvalidParameter, ConflictingParameters.
    """
    if not query and not body:
        return model()
    if query.count(b"&") > MAX_PARAMETERS:
        raise InvalidParameter(f"the query holds {query.count(b'&') + 1} options: give each once")
    given: dict[str, str] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if given.setdefault(name, value) != value:
            raise ConflictingParameters(
                f"{shown(name)} is given twice in the query, as {shown(given[name])} and as {shown(value)}: give one"
            )
    try:
        in_query = model.model_validate_strings(given)
        in_body = model.model_validate(body, strict=True)
    except ValidationError as e:
        raise _refusal(model, e) from None
    for name in in_query.model_fields_set & in_body.model_fields_set:
        if (first := getattr(in_query, name)) != (second := getattr(in_body, name)):
            raise ConflictingParameters(f"{name} is {first} in the query and {second} in the body: give one")
    return in_query.model_copy(update={name: getattr(in_body, name) for name in in_body.model_fields_set})


def _refusal(model: type[FastOptions], errors: ValidationError) -> UnknownParameter | InvalidParameter:
    first = errors.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return UnknownParameter(
            f"{shown(name)} is not an option of this endpoint; its options are {', '.join(model.model_fields)}"
        )
    return InvalidParameter(f"{name}: {complaint(model, first)}")
