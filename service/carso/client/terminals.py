"""Show a picture in a terminal that can: by the graphics of kitty, or by the inline images of iTerm2."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping

CHUNK = 4096  # characters of one escape sequence, as kitty's protocol has it


def shown(png: bytes, environment: Mapping[str, str]) -> str:
    """Return what shows a PNG file in the terminal that the environment's variables name; nothing, if it cannot.

    kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol/; iTerm2: https://iterm2.com/documentation-images.html
    """
    text = base64.b64encode(png).decode()
    program = environment.get("LC_TERMINAL") or environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or environment.get("TERM", "").startswith("screen"):
        return ""  # neither passes pictures on
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") == "xterm-kitty" or program == "ghostty":
        return "".join(_kitty(text)) + "\n"
    if program in ("iTerm2", "iTerm.app", "WezTerm"):
        return f"\x1b]1337;File=inline=1;size={len(png)}:{text}\x07\n"
    return ""


def _kitty(text: str) -> Iterator[str]:
    for start in range(0, len(text), CHUNK):
        more = int(start + CHUNK < len(text))
        keys = f"a=T,f=100,m={more}" if start == 0 else f"m={more}"
        yield f"\x1b_G{keys};{text[start : start + CHUNK]}\x1b\\"
