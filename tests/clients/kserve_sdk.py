"""Ask a service by KServe's SDK, as its documentation does, and print what it understood:
`kserve_sdk.py URL MODEL FOLDER`.

Runs in an environment of its own (tests/test_sdks.py), because the SDK pins versions that this project does not use.
"""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

url, model, folder = sys.argv[1:]
images = np.load(Path(folder) / "images.npy")


async def main() -> list[dict[str, object]]:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, model)
    answers = []
    for binary in (False, True):
        tensor = InferInput("input-0", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, binary_data=binary)
        request = InferRequest(model, [tensor], parameters={"seed": 7})
        answer = await client.infer(url, request, model_name=model)
        answers.append({output.name: output.as_numpy().tolist() for output in answer.outputs})
    return answers


sys.stdout.write(json.dumps(asyncio.run(main())))
