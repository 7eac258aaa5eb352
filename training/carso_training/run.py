"""A whole run, from a recipe to a bundle, in stages that each leave their result on disk and are not done twice.

<folder>/recipe.json     a folder belongs to one recipe
<folder>/undefended/     weights.safetensors, metrics.csv (a row per epoch)
<folder>/adversarial/
<folder>/purifier/       and the attacked images that it was trained on
<folder>/table.json      the measured table
<folder>/bundle/         the bundle
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Literal

import torch
from carso.bundle import Bundle, Cell, sealed
from carso.version import __version__
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor

from carso_training.attacks import CLEAN, FORESEEN, attack_images, attacked_in_eval_mode
from carso_training.card import model_card
from carso_training.classifier import train_adversarial, train_undefended
from carso_training.data import Dataset
from carso_training.evaluate import RISK, evaluate, pipeline_of
from carso_training.export import export
from carso_training.networks import Classifier, Purifier
from carso_training.purifier import train_purifier
from carso_training.recipe import Recipe
from carso_training.table import WIDTH, as_rich

log = logging.getLogger(__name__)

Split = Literal["validation", "test"]
CALIBRATION = 200  # images


class RunError(Exception):
    """A run folder that cannot be gone on with."""


class Run:
    """One recipe in one folder. Every method goes on from what the folder holds."""

    def __init__(self, recipe: Recipe, folder: Path, fabric: Fabric, *, train: Dataset, test: Dataset) -> None:
        """`train` and `test` are the whole sets; the recipe says how much of them is used. Raises RunError."""
        self.recipe = recipe
        self.folder = folder
        self.fabric = fabric
        training, validation = train.split(recipe.validation_images, seed=recipe.seed, train=recipe.train_images)
        self.train, self.validation = training.to(fabric.device), validation.to(fabric.device)
        self.test = test[slice(recipe.test_images)].to(fabric.device)
        if fabric.is_global_zero:
            self._claim_folder()
        fabric.barrier()

    def classifiers(self) -> tuple[Classifier, Classifier]:
        """The undefended one and the adversarially trained (IAT) one."""
        stages = ((train_undefended, "undefended"), (train_adversarial, "adversarial"))
        undefended, adversarial = (
            stage(self.fabric, self.recipe, self.train, self.validation, folder=self.folder / name)
            for stage, name in stages
        )
        return undefended, adversarial

    def purifier(self, classifier: Classifier) -> Purifier:
        return train_purifier(
            self.fabric, self.recipe, classifier, self.train, self.validation, folder=self.folder / "purifier"
        )

    def bundle(self) -> Path:
        """Train what is not trained yet, export, measure on the test set; return the bundle's folder."""
        undefended, adversarial = self.classifiers()
        purifier = self.purifier(adversarial)
        target = self.folder / "bundle"
        if self.fabric.is_global_zero and not target.exists():
            part = target.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            export(adversarial, purifier, self._calibration(adversarial), folder=part, seed=self.recipe.seed)
            self._seal(part, cells=[])
            cells = self.measure(Bundle.load(part), undefended, adversarial, split="test")
            Console(width=WIDTH).print(as_rich(cells))
            (part / "MODEL_CARD.md").write_text(model_card(self.recipe, cells, risk=RISK))
            self._seal(part, cells=cells)
            part.replace(target)
        self.fabric.barrier()
        return target

    def measure(self, bundle: Bundle, undefended: Classifier, adversarial: Classifier, *, split: Split) -> list[Cell]:
        """The table on one split, from the folder where it was measured before on the same bundle."""
        kept = self.folder / f"table-{split}.json"
        made_from = {"first_pass": bundle.manifest.files["first_pass.onnx"], "vote": bundle.manifest.files["vote.onnx"]}
        if kept.exists() and (found := json.loads(kept.read_text()))["made_from"] == made_from:
            return [Cell.model_validate(cell) for cell in found["cells"]]
        cells = evaluate(
            undefended=undefended.to(self.fabric.device),
            adversarial=adversarial.to(self.fabric.device),
            pipeline=pipeline_of(bundle),
            data=self.test if split == "test" else self.validation,
            samples=self.recipe.samples,
            seed=self.recipe.seed,
            report=lambda cell: log.info(
                "%s %s: %.2f %% (published %s)", cell.attack, cell.column, cell.accuracy, cell.published
            ),
        )
        kept.write_text(json.dumps({"made_from": made_from, "cells": [cell.model_dump() for cell in cells]}, indent=1))
        return cells

    def _calibration(self, classifier: Classifier) -> Tensor:
        """Held-out images [N, *shape], clean and under each foreseen attack."""
        images, labels = self.validation.pixels(slice(CALIBRATION)), self.validation.labels[:CALIBRATION]
        generator = torch.Generator(images.device).manual_seed(self.recipe.seed)
        with attacked_in_eval_mode(classifier):
            versions = [
                attack_images(classifier, attack, images, labels, generator=generator) for attack in (CLEAN, *FORESEEN)
            ]
        return torch.cat(versions)

    def _seal(self, folder: Path, *, cells: list[Cell]) -> None:
        config = self.recipe.classifier
        sealed(
            folder,
            {
                "name": self.recipe.name,
                "version": __version__,
                "dataset": self.recipe.dataset,
                "classes": [str(digit) for digit in range(config.classes)],
                "input": {"shape": config.input_shape},
                "code": self.recipe.purifier.code,
                "latent": self.recipe.purifier.latent,
                "samples": self.recipe.samples,
                "recipe": self.recipe.model_dump(mode="json"),
                "table": [cell.model_dump() for cell in cells],
            },
        )

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, mine = self.folder / "recipe.json", self.recipe.model_dump(mode="json")
        if not path.exists():
            path.write_text(json.dumps(mine, indent=2) + "\n")
            return
        theirs = json.loads(path.read_text())
        if theirs != mine:
            differing = sorted(key for key in mine if mine[key] != theirs.get(key))
            raise RunError(
                f"{self.folder} belongs to another recipe (it differs in {', '.join(differing)}): "
                "give another folder with --folder, or remove this one to start afresh"
            )
