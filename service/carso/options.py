"""Request options: how many votes, which seed, which risk, until when.

Callers give them as query parameters, or in a JSON body beside `images`, or both as long as they agree.
"""

from __future__ import annotations

from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from carso.choices import MAX_SEED, Risk
from carso.complaints import complaint, shown
from carso.errors import ConflictingParameters, InvalidParameter, UnknownParameter

MAX_DEADLINE_MS = 600_000
MAX_PARAMETERS = 64  # of a query: each costs time to check


class FastOptions(BaseModel):
    """The options of /classify/fast."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: bool = Field(
        default=False,
        description="Scale images of another height and width to the bundle's, without keeping their proportions, "
        "instead of refusing them.",
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


Options = TypeVar("Options", bound=FastOptions)


def robust_options(*, samples: int, max_samples: int, risk: float) -> type[RobustOptions]:
    """Return RobustOptions with the bundle's `samples`, and the operator's `max_samples` and `risk`."""
    fields = RobustOptions.model_fields
    return create_model(
        "RobustOptions",
        __base__=RobustOptions,
        samples=(int, Field(default=samples, ge=1, le=max_samples, description=fields["samples"].description)),
        risk=(Risk, Field(default=risk, description=fields["risk"].description)),
    )


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
