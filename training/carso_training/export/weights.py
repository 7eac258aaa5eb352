"""The weights of a bundle as PyTorch networks: for attacks, comparison and further training, never for the service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carso.bundle import Bundle
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from carso_training import durable
from carso_training.networks import (
    Classifier,
    Purifier,
    build_classifier,
    build_purifier,
    classifier_config,
    purifier_config,
)

CLASSIFIER = "classifier.safetensors"
SECOND_PASS = "second_pass.safetensors"  # noqa: S105 (a file; it is there if another classifier votes)
CODE_ENCODER = "code_encoder.safetensors"
DECODER = "decoder.safetensors"


def save(folder: Path, *, classifier: Classifier, purifier: Purifier, second_pass: Classifier | None = None) -> None:
    """Write the weights that are used online into `folder`.

    `second_pass`: the classifier that votes; None: the classifier of the first pass, whose weights are not written
    twice. Raises OSError.
    """
    modules = {CLASSIFIER: classifier, CODE_ENCODER: purifier.code_encoder, DECODER: purifier.decoder}
    if second_pass is not None:
        modules[SECOND_PASS] = second_pass
    for name, module in modules.items():
        durable.write(folder / name, save_tensors(module.state_dict()))


def classifier_of(bundle: Bundle) -> Classifier:
    """Return the classifier of the first pass, on the CPU and in eval mode."""
    return _classifier(bundle, CLASSIFIER, bundle.manifest.recipe["classifier"])


def second_pass_of(bundle: Bundle) -> Classifier:
    """Return the classifier that votes, on the CPU and in eval mode: often the first pass's."""
    if SECOND_PASS not in bundle.manifest.files:
        return classifier_of(bundle)
    recipe = bundle.manifest.recipe
    return _classifier(bundle, SECOND_PASS, recipe.get("second_pass") or recipe["classifier"])


def purifier_of(bundle: Bundle) -> Purifier:
    """Return the purifier, on the CPU and in eval mode. Only its code encoder and decoder have the bundle's weights."""
    purifier = build_purifier(purifier_config(bundle.manifest.recipe["purifier"]))
    purifier.code_encoder.load_state_dict(load_file(bundle.folder / CODE_ENCODER))
    purifier.decoder.load_state_dict(load_file(bundle.folder / DECODER))
    return purifier.eval()


def _classifier(bundle: Bundle, name: str, config: Mapping[str, Any]) -> Classifier:
    classifier = build_classifier(classifier_config(config))
    classifier.load_state_dict(load_file(bundle.folder / name))
    return classifier.eval()
