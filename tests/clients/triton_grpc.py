"""Ask a service by Triton's client over gRPC, and print what it understood: `triton_grpc.py ADDRESS MODEL FOLDER`.

Runs in an environment of its own (tests/test_grpc.py), because the client pins another protobuf than this project has.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

address, model, folder = sys.argv[1:]
images = np.load(Path(folder) / "images.npy")
files = [path.read_bytes() for path in sorted(Path(folder).glob("*.png"))]
answers = []
with triton.InferenceServerClient(address) as client:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    names = [output.name for output in client.get_model_metadata(model).outputs]
    for array, datatype in ((images, "FP32"), (np.array(files, np.object_), "BYTES")):
        tensor = triton.InferInput("images", list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        answer = client.infer(model, [tensor], parameters={"seed": 7}, client_timeout=60)
        values = {name: answer.as_numpy(name).tolist() for name in names}
        answers.append(
            {name: [v.decode() if isinstance(v, bytes) else v for v in found] for name, found in values.items()}
        )
    try:
        client.infer(
            model, [triton.InferInput("images", [1, 2], "FP32").set_data_from_numpy(np.zeros((1, 2), np.float32))]
        )
    except InferenceServerException as e:
        assert e.status() == "StatusCode.INVALID_ARGUMENT", e
        assert "wrong_shape" in e.message()
    else:
        raise AssertionError("an image of the wrong shape was classified")
sys.stdout.write(json.dumps(answers))
