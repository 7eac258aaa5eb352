"""MLServer, with its adaptive batching: https://docs.seldon.ai/mlserver/user-guide/adaptive-batching

Run it by `mlserver start FOLDER`, with this file and the two of settings that `python with_mlserver.py FOLDER` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from system import MAX_BATCH, MAX_WAIT, PORT, WORKERS, System


class Peer(MLModel):
    """A tensor of PNG files, in base64 -> a tensor of tallies."""

    async def load(self) -> bool:
        self.system = System()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        files = Base64Codec.decode_input(payload.inputs[0])
        found = self.system.classify(np.concatenate([self.system.read(file) for file in files]))
        tallies = np.array([each["tally"] for each in found])
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("tallies", tallies)])


def write_settings(folder: Path) -> None:
    """Write the files that MLServer reads."""
    server = {"http_port": PORT, "host": "127.0.0.1", "parallel_workers": WORKERS, "debug": False}
    server |= {"grpc_port": PORT + 1, "metrics_port": PORT + 2, "metrics_dir": str(folder / "metrics")}
    model = {"name": "peer", "implementation": "with_mlserver.Peer"}
    model |= {"max_batch_size": MAX_BATCH, "max_batch_time": MAX_WAIT}
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))


if __name__ == "__main__":
    write_settings(Path(sys.argv[1]))
