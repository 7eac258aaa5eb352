"""Bundles with random weights: the real file format, the real export, no training.

The weights are seeded, and scaled so that elections come out in every way: undisputed ones, close ones, and ones in
which many classes get votes. Batch norms hold random statistics, so that folding them is no identity.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from carso.bundle import sealed
from carso_training.export import export
from carso_training.networks import Classifier, ClassifierConfig, Purifier, PurifierConfig, SystemConfig
from torch import nn

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "bundles"

REFERENCE = SystemConfig()  # the published sizes
SMALL = SystemConfig(
    classifier=ClassifierConfig(input_shape=(1, 8, 8), hidden=(24, 16), classes=10),
    purifier=PurifierConfig(
        input_shape=(1, 8, 8),
        representation=24 + 16 + 10,
        input_encoder=(20, 12),
        code_encoder=(20, 8),
        encoder=(16, 12),
        latent=6,
        decoder=(40, 32),
    ),
)
COLOUR = SystemConfig(  # three channels, not square, three classes: nothing of it is MNIST's
    classifier=ClassifierConfig(input_shape=(3, 6, 5), hidden=(24, 16), classes=3),
    purifier=replace(SMALL.purifier, input_shape=(3, 6, 5), representation=24 + 16 + 3),
)

CODE_WEIGHT = 6.0  # in the decoder's first layer: how far images differ from each other
LATENT_WEIGHT = 1.0  # and how far the votes of one image do
LAYER_WEIGHT = 3.0  # of all other layers: PyTorch's own start would let every signal fade


def random_system(config: SystemConfig = SMALL, *, seed: int = 0) -> tuple[Classifier, Purifier]:
    """Both networks with seeded random weights and batch norm statistics, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        classifier, purifier = Classifier(config.classifier).eval(), Purifier(config.purifier).eval()
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


def _give_every_class_a_chance(classifier: Classifier, purifier: Purifier) -> None:
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
    export(classifier, purifier, torch.from_numpy(random_images(8, config, seed=seed)), folder=folder)
    fields = {
        "name": "random",
        "version": "0.0.1",
        "dataset": "none",
        "classes": [str(index) for index in range(config.classifier.classes)],
        "input": {"shape": list(config.classifier.input_shape)},
        "code": config.purifier.code,
        "latent": config.purifier.latent,
        "samples": 1500,
        "recipe": {"name": "random", "seed": seed},
        "table": [],
    }
    sealed(folder, fields | manifest)
    return folder


def shared_bundle(config: SystemConfig = SMALL) -> Path:
    """One random bundle for all processes of a test run: not to be written to; damage a copy of it.

    To export one takes seconds, so it is kept for the next run too, as long as no source of it changes.
    """
    return _shared_bundle(config)


@cache
def _shared_bundle(config: SystemConfig) -> Path:
    folder = CACHE / hashlib.sha256(f"{_sources()} {config}".encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = write_bundle(Path(tempfile.mkdtemp(dir=CACHE)), config)
            made.rename(folder)
    return folder


@cache
def _sources() -> str:
    """A checksum of all that decides what is exported."""
    files = [Path(__file__), *(ROOT / "service/carso").glob("bundle.py"), *(ROOT / "training").rglob("*.py")]
    sources = b"".join(path.read_bytes() for path in sorted(files))
    versions = [version(package) for package in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")]
    return hashlib.sha256(sources + repr(versions).encode()).hexdigest()


def copy_of(bundle: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(bundle, folder)
