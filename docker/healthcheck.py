"""Exit with 0 if the server of this container is ready, for HEALTHCHECK: the image has no curl."""

import os
import sys
from http.client import HTTPConnection  # urllib would ask a proxy, if the environment names one

connection = HTTPConnection("127.0.0.1", int(os.environ["CARSO_PORT"]), timeout=2)
try:
    connection.request("GET", "/readyz")
    ready = connection.getresponse().status == 200
except OSError:
    ready = False
sys.exit(not ready)
