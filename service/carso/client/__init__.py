"""The client: classify from Python, with deadlines and retries. What it does and how to use it: docs/client.md.

    with Client("http://127.0.0.1:8000") as client:
        (prediction,) = client.classify("digit.png").predictions

It imports nothing of the server's half.
"""

from carso.client.clients import AsyncClient, Client
from carso.client.errors import CarsoError, DeadlineExceeded, RequestRefused, Unavailable, UnexpectedAnswer
from carso.client.images import Image, Images
from carso.client.results import FastPrediction, FastResult, Info, RobustPrediction, RobustResult

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
]
