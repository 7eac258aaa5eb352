"""Which build of ONNX Runtime is installed: exactly one has to be, because all of them overwrite the same files."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

CPU_BUILD, GPU_BUILD = "onnxruntime", "onnxruntime-gpu"
BUILDS = (
    CPU_BUILD,
    GPU_BUILD,
    "onnxruntime-directml",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
)
MEND = "pip install 'carso[cpu]', or pip install 'carso[gpu]' for NVIDIA GPUs"


class InstallationError(Exception):
    """The packages that are installed cannot serve. The message names them, and the command that mends it."""


def check_runtime() -> None:
    """Check that exactly one build of ONNX Runtime is installed, without importing it. Raises InstallationError."""
    found = [build for build in BUILDS if installed(build)]
    if len(found) > 1:
        raise InstallationError(
            f"{' and '.join(found)} are both installed, and overwrite each other's files. Remove all of them, then "
            f"install one: pip uninstall --yes {' '.join(found)} && {MEND}"
        )
    if not found and find_spec("onnxruntime") is None:  # builds of other names exist, and are welcome
        raise InstallationError(
            f"neither {CPU_BUILD} nor {GPU_BUILD} is installed, and one of them runs the networks: {MEND}"
        )


def installed(distribution: str) -> bool:
    """Tell whether a distribution is installed."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
