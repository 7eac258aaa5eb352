"""The PyTorch networks of a bundle, out of its weights: for attacks and for comparison, never for the service."""

from __future__ import annotations

from carso.bundle import Bundle
from carso_training.networks import Classifier, ClassifierConfig, Purifier, PurifierConfig
from pydantic import TypeAdapter
from safetensors.torch import load_file


def classifier_of(bundle: Bundle) -> Classifier:
    """The classifier of the first pass, in eval mode."""
    config = TypeAdapter(ClassifierConfig).validate_python(bundle.manifest.recipe.get("classifier", {}))
    classifier = Classifier(config)
    classifier.load_state_dict(load_file(bundle.folder / "classifier.safetensors"))
    return classifier.eval()


def purifier_of(bundle: Bundle) -> Purifier:
    """The purifier in eval mode; only its code encoder and decoder have the bundle's weights."""
    config = TypeAdapter(PurifierConfig).validate_python(bundle.manifest.recipe.get("purifier", {}))
    purifier = Purifier(config)
    purifier.code_encoder.load_state_dict(load_file(bundle.folder / "code_encoder.safetensors"))
    purifier.decoder.load_state_dict(load_file(bundle.folder / "decoder.safetensors"))
    return purifier.eval()
