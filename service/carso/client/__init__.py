"""The Python client and the commands that use it. Its public names are imported from `carso`; see docs/client.md.

This package imports nothing of the server.
"""

DEFAULT_URL = "http://127.0.0.1:8000"
