"""Ask a service with MLServer's types and codecs, as its documentation does, and print what they read in the answers:
`mlserver_codecs.py URL MODEL FOLDER`.

Runs in an environment of its own (tests/test_sdks.py), because MLServer pins versions that this project does not use.
"""

import json
import sys
import urllib.request
from pathlib import Path

import numpy as np
from mlserver.codecs import Base64Codec, NumpyCodec, NumpyRequestCodec, StringCodec
from mlserver.types import (
    InferenceRequest,
    InferenceResponse,
    MetadataModelResponse,
    MetadataServerResponse,
    Parameters,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
)

url, model, folder = sys.argv[1:]
images = np.load(Path(folder) / "images.npy")


def get(path: str) -> bytes:
    with urllib.request.urlopen(f"{url}{path}") as answer:  # noqa: S310
        return answer.read()


def post(path: str, content: str) -> bytes:
    request = urllib.request.Request(f"{url}{path}", content.encode(), {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        return answer.read()


MetadataServerResponse.model_validate_json(get("/v2"))
MetadataModelResponse.model_validate_json(get(f"/v2/models/{model}"))
index = post("/v2/repository/index", RepositoryIndexRequest(ready=True).model_dump_json())
assert model in [entry.name for entry in RepositoryIndexResponse.model_validate_json(index)]

seed = {"seed": 7}
encoded = [file.read_bytes() for file in sorted(Path(folder).glob("*.png"))]
requests = [
    NumpyRequestCodec.encode_request(images),
    InferenceRequest(inputs=[NumpyCodec.encode_input("images", images)]),
    InferenceRequest(inputs=[Base64Codec.encode_input("images", encoded, use_bytes=False)]),
]
answers = []
for request in requests:
    given = request.parameters.model_dump() if request.parameters else {}
    request.parameters = Parameters(**(given | seed))
    # with every field that is None, and without
    for content in (request.model_dump_json(), request.model_dump_json(exclude_none=True)):
        answer = InferenceResponse.model_validate_json(post(f"/v2/models/{model}/infer", content))
        read = {
            output.name: (StringCodec if output.datatype == "BYTES" else NumpyCodec).decode_output(output)
            for output in answer.outputs
        }
        answers.append({name: np.asarray(values).tolist() for name, values in read.items()})

sys.stdout.write(json.dumps(answers))
