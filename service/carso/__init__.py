"""CARSO: image classification that is hardened against adversarial inputs, as a service and its Python client.

    from carso import Client

    with Client("http://127.0.0.1:8000") as client:
        (prediction,) = client.classify("digit.png").predictions
        print(prediction.class_name)

These names are imported when they are first used, because the service and `carso --help` do without the client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carso.client.clients import AsyncClient, Client
    from carso.client.errors import (
        CarsoError,
        DeadlineExceeded,
        RequestRefused,
        Unavailable,
        UnexpectedAnswer,
        UnusableVariable,
    )
    from carso.client.images import Image, Images
    from carso.client.results import (
        Explanation,
        FastFrame,
        FastPrediction,
        FastResult,
        FirstPass,
        FrameError,
        Info,
        RobustFrame,
        RobustPrediction,
        RobustResult,
        Tally,
    )
    from carso.client.streaming import Frame, StreamAnswer
    from carso.version import __version__

__all__ = [
    "AsyncClient",
    "CarsoError",
    "Client",
    "DeadlineExceeded",
    "Explanation",
    "FastFrame",
    "FastPrediction",
    "FastResult",
    "FirstPass",
    "Frame",
    "FrameError",
    "Image",
    "Images",
    "Info",
    "RequestRefused",
    "RobustFrame",
    "RobustPrediction",
    "RobustResult",
    "StreamAnswer",
    "Tally",
    "Unavailable",
    "UnexpectedAnswer",
    "UnusableVariable",
    "__version__",
]

_HOMES = {
    "carso.client.clients": ("AsyncClient", "Client"),
    "carso.client.errors": (
        "CarsoError",
        "DeadlineExceeded",
        "RequestRefused",
        "Unavailable",
        "UnexpectedAnswer",
        "UnusableVariable",
    ),
    "carso.client.images": ("Image", "Images"),
    "carso.client.results": (
        "Explanation",
        "FastFrame",
        "FastPrediction",
        "FastResult",
        "FirstPass",
        "FrameError",
        "Info",
        "RobustFrame",
        "RobustPrediction",
        "RobustResult",
        "Tally",
    ),
    "carso.client.streaming": ("Frame", "StreamAnswer"),
    "carso.version": ("__version__",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
