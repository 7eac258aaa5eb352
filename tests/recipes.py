"""Parts of recipes for trainings that take seconds."""

from __future__ import annotations

SMALL_NETWORKS = {
    "classifier": {"hidden": [24, 16]},
    "purifier": {
        "input_encoder": [20, 12],
        "code_encoder": [20, 8],
        "encoder": [16, 12],
        "latent": 6,
        "decoder": [40, 32],
    },
}
