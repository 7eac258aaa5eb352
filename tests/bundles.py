"""Bundles with random weights: the real file format, the real export, no training.

The weights are seeded, and scaled so that elections come out in every way: undisputed ones, close ones, and ones in
which many classes get votes. Batch norms hold random statistics, so that folding them is no identity.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import carso.bundle
import carso_training
import numpy as np
import onnx
import torch
from carso.bundle import Bundle, BundleError, sealed
from carso_training.export.files import export
from carso_training.networks.fcn import FcnClassifier, FcnClassifierConfig, FcnPurifier, FcnPurifierConfig
from carso_training.recipe import PRESETS
from torch import nn


@dataclass(frozen=True)
class SystemConfig:
    """Both networks of one system; the purifier's representation size must be the classifier's."""

    classifier: FcnClassifierConfig
    purifier: FcnPurifierConfig


def _small(*, input_shape: tuple[int, int, int], classes: int) -> SystemConfig:
    classifier = FcnClassifierConfig(input_shape=input_shape, hidden=(24, 16), classes=classes, mean=0.1307, std=0.3081)
    purifier = FcnPurifierConfig(
        input_shape=input_shape,
        representation=classifier.representation,
        input_encoder=(20, 12),
        code_encoder=(20, 8),
        encoder=(16, 12),
        latent=6,
        decoder=(40, 32),
    )
    return SystemConfig(classifier, purifier)


REFERENCE = SystemConfig(PRESETS["mnist-fcn"].classifier, PRESETS["mnist-fcn"].purifier)  # the published sizes
SMALL = _small(input_shape=(1, 8, 8), classes=10)
COLOUR = _small(input_shape=(3, 6, 5), classes=3)  # three channels, not square, three classes: nothing of it is MNIST's

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "bundles"
# All that decides what an export writes
SOURCES = (
    Path(__file__),
    Path(carso.bundle.__file__),
    *(
        path
        for room in ("export", "networks")
        for path in sorted(Path(carso_training.__file__).parent.glob(f"{room}/*.py"))
    ),
)

# About half of random images are typical
TYPICAL = {"eps": 0.3, "excess": 0.17, "contrast": 0.5, "table": [{"kind": "clean", "images": 9, "untypical": 1}]}

# One random image in ten is as near to one of a thousand others
NEAR = {"distance": 0.05, "share": 0.1, "images": 1000}

CODE_WEIGHT = 6.0  # in the decoder's first layer: how far images differ from each other
LATENT_WEIGHT = 1.0  # and how far the votes of one image do
LAYER_WEIGHT = 3.0  # of all other layers: PyTorch's own start would let every signal fade


def random_system(config: SystemConfig = SMALL, *, seed: int = 0) -> tuple[FcnClassifier, FcnPurifier]:
    """Both networks with seeded random weights and batch norm statistics, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        classifier, purifier = FcnClassifier(config.classifier).eval(), FcnPurifier(config.purifier).eval()
        for module in (*classifier.modules(), *purifier.modules()):
            if isinstance(module, nn.Linear):
                module.weight *= LAYER_WEIGHT
            elif isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.3, 2.0)
                nn.init.normal_(module.weight, mean=1.0, std=0.3)
                nn.init.normal_(module.bias, std=0.3)
        code, first = config.purifier.code, purifier.decoder[0]
        first.weight[:, :code] *= CODE_WEIGHT / LAYER_WEIGHT
        first.weight[:, code:] *= LATENT_WEIGHT / LAYER_WEIGHT
        _give_every_class_a_chance(classifier, purifier)
    return classifier, purifier


def _give_every_class_a_chance(classifier: FcnClassifier, purifier: FcnPurifier) -> None:
    """Standardise the scores of each class, before the last Mish, over the votes on random images."""
    images = torch.rand(2000, *purifier.config.input_shape)
    codes = purifier.encode(classifier.represent(images).representation)
    x = classifier.represent(purifier.decode(codes, torch.randn(2000, purifier.config.latent))).representation
    wide = classifier.last.in_features
    hidden = classifier.norms[-1](x[:, -wide - classifier.config.classes : -classifier.config.classes])
    std, mean = torch.std_mean(classifier.last(hidden), dim=0)
    classifier.last.weight /= std[:, None]
    classifier.last.bias.sub_(mean).div_(std)


def random_images(count: int, config: SystemConfig = SMALL, *, seed: int = 0) -> np.ndarray:
    """[count, *shape] float32 in [0, 1]."""
    return np.random.default_rng(seed).random((count, *config.classifier.input_shape), dtype=np.float32)


def write_bundle(folder: Path, config: SystemConfig = SMALL, *, seed: int = 0, **manifest: Any) -> Path:
    """Export and seal a random bundle; `manifest` replaces fields of it. Returns the folder."""
    classifier, purifier = random_system(config, seed=seed)
    images = torch.from_numpy(random_images(8, config, seed=seed))
    export(classifier=classifier, purifier=purifier, images=images, folder=folder)
    fields = {
        "name": "random",
        "version": "0.0.1",
        "dataset": "none",
        "classes": [str(index) for index in range(config.classifier.classes)],
        "input": {"shape": list(config.classifier.input_shape)},
        "code": config.purifier.code,
        "latent": config.purifier.latent,
        "samples": 1500,
        "recipe": {
            "name": "random",
            "seed": seed,
            "classifier": config.classifier.model_dump(mode="json"),
            "purifier": config.purifier.model_dump(mode="json"),
        },
        "table": [],
        "disagreement": {"images": 100, "disagree": 20},
        "near_duplicates": NEAR if config.classifier.input_shape[0] == 1 else None,
        "proofs": {"eps": 0.3, "images": 100, "proven": 90},
        "typical": TYPICAL if config.classifier.input_shape[0] == 1 else None,  # colour bundles cannot tell
    }
    sealed(folder, fields | manifest)
    return folder


def shared_bundle(config: SystemConfig = SMALL) -> Path:
    """One random bundle for all tests: not to be written to; damage a copy of it.

    An export takes seconds, so it is kept in pytest's cache for all processes, and for later runs of the same code.
    """
    return _shared_bundle(config.classifier.model_dump_json(), config.purifier.model_dump_json())


@cache
def _shared_bundle(classifier: str, purifier: str) -> Path:
    config = SystemConfig(
        FcnClassifierConfig.model_validate_json(classifier), FcnPurifierConfig.model_validate_json(purifier)
    )
    made_of = hashlib.sha256(f"{torch.__version__} {onnx.__version__}".encode())
    for path in SOURCES:
        made_of.update(path.read_bytes())
    name = hashlib.sha256(f"{classifier}{purifier}".encode()).hexdigest()[:8]
    folder = CACHE / f"{name}-{made_of.hexdigest()[:8]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process makes it, the others wait
        if not _is_intact(folder):
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=CACHE) as part:
                write_bundle(Path(part) / "bundle", config).replace(folder)
    return folder


def _is_intact(folder: Path) -> bool:
    try:
        return bool(Bundle.load(folder))
    except BundleError:
        return False


def copy_of(bundle: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(bundle, folder)
