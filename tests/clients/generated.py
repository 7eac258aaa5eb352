"""Ask a service by a client that openapi-python-client made of its own document, and print what the client understood:
`generated.py URL PACKAGE FOLDER`.

Runs in the generator's environment (tests/test_generated_client.py): what it makes needs attrs.
"""

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

url, package, folder = sys.argv[1:]
sys.path.insert(0, str(Path(package).parent))

from generated import Client  # noqa: E402
from generated.api.default import classify, classify_fast, info, readyz  # noqa: E402
from generated.models import ClassifyFastJsonBody, ClassifyFilesBody, ClassifyJsonBody, ErrorAnswer  # noqa: E402
from generated.types import File  # noqa: E402

files = sorted(Path(folder).glob("*.png"))
arrays = json.loads((Path(folder) / "images.json").read_text())
encoded = [base64.b64encode(path.read_bytes()).decode() for path in files]
uploads = [File(payload=BytesIO(path.read_bytes()), file_name=path.name, mime_type="image/png") for path in files]
client = Client(base_url=url, raise_on_unexpected_status=True)

robust = [
    classify.sync(client=client, body=ClassifyJsonBody(images=arrays, seed=7)),
    classify.sync(client=client, body=ClassifyJsonBody(images=encoded, seed=7)),
    classify.sync(client=client, body=ClassifyFilesBody(file=uploads), seed=7),
]
fast = [classify_fast.sync(client=client, body=ClassifyFastJsonBody(images=arrays))]
refused = classify.sync_detailed(client=client, body=ClassifyJsonBody(images=[[[0.5]]]))
assert isinstance(refused.parsed, ErrorAnswer), refused
assert readyz.sync_detailed(client=client).status_code == 200
sys.stdout.write(
    json.dumps(
        {
            "robust": [answer.to_dict() for answer in robust],
            "fast": [answer.to_dict() for answer in fast],
            "refused": [refused.status_code, refused.parsed.to_dict()],
            "info": info.sync(client=client).to_dict(),
        }
    )
)
