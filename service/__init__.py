"""The online half of CARSO: load a bundle, run the two-pass pipeline, answer over HTTP."""

import os
from importlib.metadata import PackageNotFoundError, version

# ONNX Runtime's own wheels report on its use from 1.29 on, unless told not to before the first import
# (https://github.com/microsoft/onnxruntime/pull/27379). Whoever wants that says so in the environment.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    __version__ = version("carso")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"
