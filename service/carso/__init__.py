"""CARSO: image classification that is hardened against adversarial inputs, as a service and its Python client.

from carso import Client

with Client("http://127.0.0.1:8000") as client:
    (prediction,) = client.classify("digit.png").predictions
"""

from carso.client import (
    AsyncClient,
    CarsoError,
    Client,
    DeadlineExceeded,
    FastPrediction,
    FastResult,
    Image,
    Images,
    Info,
    RequestRefused,
    RobustPrediction,
    RobustResult,
    Unavailable,
    UnexpectedAnswer,
)
from carso.version import __version__

__all__ = [
    "AsyncClient",
    "CarsoError",
    "Client",
    "DeadlineExceeded",
    "FastPrediction",
    "FastResult",
    "Image",
    "Images",
    "Info",
    "RequestRefused",
    "RobustPrediction",
    "RobustResult",
    "Unavailable",
    "UnexpectedAnswer",
    "__version__",
]
