"""Exit with 0 if the server of this container is ready, for HEALTHCHECK: the image has no curl."""

import os
import sys
from http.client import HTTPConnection, HTTPException  # urllib would ask a proxy, if the environment names one

# What listens on every address listens on this machine's own, of either family.
OWN = {"::": ("::1", "127.0.0.1"), "0.0.0.0": ("127.0.0.1",)}  # noqa: S104


def is_ready(host: str) -> bool:
    """Ask at one address."""
    connection = HTTPConnection(host, int(os.environ["CARSO_PORT"]), timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False


named = os.environ["CARSO_HOST"]
sys.exit(not any(is_ready(host) for host in OWN.get(named, (named,))))
