"""Start `carso-train`; `python -m carso_training` is the same.

The command needs packages that only the extra [train] installs. This file needs none of them, so that it can say so.
"""

from __future__ import annotations

import sys

from carso.version import __version__


def main() -> None:
    """Run `carso-train`. Exits with 1 and one line if a package that it needs is not installed."""
    if sys.argv[1:] == ["--version"]:  # at once: the rest takes seconds to load
        print(f"carso-train {__version__}")
        return
    try:
        from carso_training import command
    except ModuleNotFoundError as e:
        missing = (e.name or "").partition(".")[0]
        if missing in ("carso", "carso_training"):
            raise
        print(
            f"carso-train: {missing} is not installed, and training needs it: pip install 'carso[cpu,train]', or "
            "pip install 'carso[gpu,train]' for NVIDIA GPUs",
            file=sys.stderr,
        )
        sys.exit(1)
    command.main()


if __name__ == "__main__":
    main()
