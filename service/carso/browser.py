"""Open a page in this machine's browser, if there is one that people look at."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser

# What tells that a program may open a window. BROWSER names a browser outright; the last is Linux inside Windows.
_WINDOWS = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "WSL_DISTRO_NAME")


def opens(url: str) -> bool:
    """Begin to open `url`, and tell whether there is a browser. It never waits for one.

    A browser that runs in a terminal does not count: it would take the terminal of whoever serves.
    """
    if sys.platform.startswith("linux") and not any(name in os.environ for name in _WINDOWS):
        return False
    try:
        found = webbrowser.get()
    except webbrowser.Error:
        return False
    threading.Thread(target=found.open, args=(url,), name="carso-browser", daemon=True).start()
    return True
