"""A whole run, from a recipe to a bundle, in stages that each leave their result on disk and are not done twice.

<folder>/recipe.json            a folder belongs to one recipe
<folder>/undefended/            weights.safetensors, metrics.csv (a row per epoch)
<folder>/adversarial/
<folder>/purifier/              and the attacked images that it was trained on
<folder>/hardening/             if the recipe asks for it: all networks, trained on together
<folder>/table-<split>.json     the measured table
<folder>/typical.json           which images are typical
<folder>/bundle/                the bundle
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from carso.bundle import FIRST_PASS, VOTE, Bundle, Cell, Disagreement, NearDuplicates, Proofs, Typical, sealed
from carso.choices import DEFAULT_EPS
from carso.version import __version__
from lightning_fabric import Fabric
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from carso_training import durable
from carso_training.attacks import CLEAN
from carso_training.attacks.model import attacked_in_eval_mode
from carso_training.datasets.examples import Examples
from carso_training.errors import RecipeError, RunError
from carso_training.export.files import export
from carso_training.fitting.certified import train_certified
from carso_training.fitting.checkpoints import load_weights
from carso_training.fitting.classifier import train_adversarial, train_undefended
from carso_training.fitting.hardened import Hardened, begun_second_pass, harden
from carso_training.fitting.loop import WEIGHTS
from carso_training.fitting.purifier import train_purifier
from carso_training.fitting.robust import train_robust
from carso_training.networks import Classifier, Purifier, build_classifier, build_purifier
from carso_training.recipe import PRESETS, Recipe
from carso_training.robustness.card import CARD, model_card
from carso_training.robustness.certified import proofs_of
from carso_training.robustness.disagreement import disagreement_of
from carso_training.robustness.duplicates import near_duplicates_of
from carso_training.robustness.published import PUBLISHED_ACCURACIES, PUBLISHED_FOR, RISK, measure
from carso_training.robustness.table import WIDTH, as_rich
from carso_training.robustness.typical import typical_of
from carso_training.robustness.voting import pipeline_of

log = logging.getLogger(__name__)

R = TypeVar("R")

Split = Literal["validation", "test"]
CALIBRATION = 200  # images

Stage = Literal["undefended", "adversarial", "purifier", "hardening"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained networks, in eval mode, on the device of the run."""

    undefended: Classifier  # trained on clean images only, for comparison
    classifier: Classifier  # the adversarially trained one, of the first pass: by IAT, or hardened
    purifier: Purifier
    second_pass: Classifier | None = None  # the classifier that votes; None: `classifier`


class RunFolder:
    """The files of one recipe's run, and whether they are finished. Nothing here trains or loads a network."""

    def __init__(self, recipe: Recipe, path: Path) -> None:
        self.recipe = recipe
        self.path = path
        self.bundle = path / "bundle"
        self._recipe_file = path / "recipe.json"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of this recipe, in order."""
        return tuple(stage for stage in STAGES if stage != "hardening" or self.recipe.hardening is not None)

    def stage(self, name: Stage) -> Path:
        """The folder of one stage's training."""
        return self.path / name

    def weights(self, stage: Stage) -> Path:
        """The file that is there once a network is trained."""
        return self.stage(stage) / WEIGHTS

    def claim(self) -> None:
        """Make the folder this recipe's. Raises RunError if it is another's, OSError if it cannot be written."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._recipe_file.exists():
            self._check_owner()
        else:
            durable.write(self._recipe_file, json.dumps(self.recipe.model_dump(mode="json"), indent=2) + "\n")

    def check_finished(self) -> None:
        """Raise RunError if the run is another recipe's, or not finished; the message says how to finish it."""
        if not self._recipe_file.exists():
            raise self._unfinished(f"{self.path} holds no run")
        self._check_owner()
        for path in (*map(self.weights, self.stages), self.bundle):
            if not path.exists():
                raise self._unfinished(f"{path} is not there yet")

    def _check_owner(self) -> None:
        mine = self.recipe.model_dump(mode="json")
        try:
            theirs = json.loads(self._recipe_file.read_bytes())
            if not isinstance(theirs, dict):
                raise ValueError("it is not a JSON object")
        except (ValueError, RecursionError) as e:
            raise RunError(
                f"{self._recipe_file} is damaged ({e}). If the folder belongs to the recipe {self.recipe.name}, remove "
                "this file, then run the same command again"
            ) from None
        # An earlier release wrote fewer fields: new ones then had their defaults. What is no recipe stays as it is
        with suppress(ValidationError):
            theirs = Recipe.model_validate(theirs).model_dump(mode="json")
        if theirs != mine:
            differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            raise RunError(
                f"{self.path} belongs to another recipe (it differs in {', '.join(differing)}): give another folder "
                "with --folder, or remove this one to start again"
            )

    def _unfinished(self, what: str) -> RunError:
        preset = self.recipe.name if PRESETS.get(self.recipe.name) == self.recipe else "RECIPE"
        return RunError(
            f"{what}, so the run is not finished. Finish it with: carso-train run {preset} --folder {self.path}"
            + (" (with the same recipe and options)" if preset == "RECIPE" else "")
        )


class Run:
    """One recipe in one folder. `train` and `export` resume from what the folder holds; nothing else trains."""

    def __init__(self, recipe: Recipe, folder: Path, fabric: Fabric, *, train: Examples, test: Examples) -> None:
        """`train` and `test` are the whole sets; the recipe says how much of them is used.

        Nothing is written yet. Raises RecipeError if the training set is smaller than what the recipe asks for.
        """
        self.recipe = recipe
        self.folder = RunFolder(recipe, folder)
        self.fabric = fabric
        try:
            training, validation = train.split(
                held_out=recipe.validation_images, seed=recipe.seed, train=recipe.train_images
            )
        except ValueError as e:
            raise RecipeError(f"recipe {recipe.name}, train_images and validation_images: {e}") from None
        self.training, self.validation = training.to(fabric.device), validation.to(fabric.device)
        self.test = test[slice(recipe.test_images)].to(fabric.device)

    def train(self) -> Trained:
        """Train the networks that are not trained yet; return all.

        Raises RunError if the folder belongs to another recipe or holds a damaged file, TrainingError if a training
        fails, and OSError if the folder cannot be written.
        """
        if self.fabric.is_global_zero:
            self.folder.claim()
        self.fabric.barrier()
        images = {"train": self.training, "held_out": self.validation}
        trainers: dict[Stage, Callable[..., Classifier]] = {
            "undefended": train_undefended,
            "adversarial": self._adversarial_trainer(),
        }
        for stage, train in trainers.items():
            if not self.folder.weights(stage).exists():
                train(self.fabric, self.recipe, **images, folder=self.folder.stage(stage))
        if not self.folder.weights("purifier").exists():
            classifier = self._classifier("adversarial")
            train_purifier(self.fabric, self.recipe, classifier, **images, folder=self.folder.stage("purifier"))
        if "hardening" in self.folder.stages and not self.folder.weights("hardening").exists():
            networks = {"classifier": self._classifier("adversarial"), "purifier": self._purifier()}
            harden(self.fabric, self.recipe, **networks, **images, folder=self.folder.stage("hardening"))
        return self._trained()

    def export(self, system: Trained) -> Path:
        """Export a trained system, measure it on the test set, and return the bundle's folder.

        A bundle that is already there stays as it is. Raises OSError if the folder cannot be written.
        """
        target = self.folder.bundle
        if self.fabric.is_global_zero and not target.exists():
            part = target.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            unbounded = export(
                classifier=system.classifier,
                purifier=system.purifier,
                second_pass=system.second_pass,
                images=self._calibration(system.classifier),
                folder=part,
                seed=self.recipe.seed,
            )
            self._seal(part, cells=[], unbounded=unbounded)
            cells = self.measure(system, Bundle.load(part), split="test")
            for table in as_rich(cells):
                Console(width=WIDTH).print(table)
            typical = self.typical(Bundle.load(part))
            disagreement = disagreement_of(Bundle.load(part), validation=self.validation, seed=self.recipe.seed)
            near = near_duplicates_of(Bundle.load(part), validation=self.validation, seed=self.recipe.seed)
            proofs = None
            if unbounded is None:
                proofs = proofs_of(Bundle.load(part), validation=self.validation, eps=DEFAULT_EPS)
            (part / CARD).write_text(model_card(self.recipe, cells, risk=RISK, typical=typical))
            self._seal(
                part,
                cells=cells,
                typical=typical,
                disagreement=disagreement,
                near_duplicates=near,
                proofs=proofs,
                unbounded=unbounded,
            )
            part.replace(target)
            durable.sync_folder(target.parent)
        self.fabric.barrier()
        return target

    def load(self) -> tuple[Trained, Bundle]:
        """Return the networks and the bundle of a finished run, without any training.

        Raises RunError if the run is not finished, which says how to finish it, or if a file is damaged; and
        BundleError if the bundle is damaged.
        """
        self.folder.check_finished()
        return self._trained(), Bundle.load(self.folder.bundle)

    def measure(self, system: Trained, bundle: Bundle, *, split: Split) -> list[Cell]:
        """Return the measured table on one split. It is kept in the folder, and measured again for another bundle."""
        kept = _Kept(self.folder.path / f"table-{split}.json", bundle)
        if (found := kept.read(lambda content: [Cell.model_validate(cell) for cell in content["cells"]])) is not None:
            return found
        cells = measure(
            undefended=system.undefended,
            classifier=system.classifier,
            pipeline=pipeline_of(bundle),
            data=self.test if split == "test" else self.validation,
            samples=self.recipe.samples,
            seed=self.recipe.seed,
            published=PUBLISHED_ACCURACIES if self.recipe.dataset == PUBLISHED_FOR else None,
            report=lambda cell: log.info(
                "%s, %s: %.2f %% (published: %s)", cell.threat.name, cell.defence, cell.accuracy, cell.published
            ),
        )
        kept.write({"cells": [cell.model_dump() for cell in cells]})
        return cells

    def typical(self, bundle: Bundle) -> Typical:
        """Return which images are typical of a bundle; see `robustness.typical`. It is kept in the folder too."""
        kept = _Kept(self.folder.path / "typical.json", bundle)
        if (found := kept.read(lambda content: Typical.model_validate(content["typical"]))) is not None:
            return found
        typical = typical_of(
            bundle, validation=self.validation, test=self.test, seed=self.recipe.seed, device=self.fabric.device
        )
        kept.write({"typical": typical.model_dump()})
        return typical

    def _adversarial_trainer(self) -> Callable[..., Classifier]:
        if self.recipe.certified_training is not None:
            return train_certified
        return train_adversarial if self.recipe.robust_training is None else train_robust

    def _trained(self) -> Trained:
        undefended, classifier, purifier = (
            self._classifier("undefended"),
            self._classifier("adversarial"),
            self._purifier(),
        )
        if "hardening" not in self.folder.stages:
            return Trained(undefended=undefended, classifier=classifier, purifier=purifier)
        second_pass = begun_second_pass(self.recipe, classifier)
        hardened = Hardened(classifier=classifier, purifier=purifier, second_pass=second_pass)
        load_weights(hardened, self.folder.weights("hardening"))
        return Trained(
            undefended=undefended,
            classifier=hardened.classifier,
            purifier=hardened.purifier,
            second_pass=hardened.second_pass,
        )

    def _classifier(self, stage: Stage) -> Classifier:
        classifier = build_classifier(self.recipe.classifier)
        load_weights(classifier, self.folder.weights(stage))
        return classifier.to(self.fabric.device).eval()

    def _purifier(self) -> Purifier:
        purifier = build_purifier(self.recipe.purifier)
        load_weights(purifier, self.folder.weights("purifier"))
        return purifier.to(self.fabric.device).eval()

    def _calibration(self, classifier: Classifier) -> Tensor:
        """Held-out images [N, *shape], clean and under each foreseen attack."""
        images, labels = self.validation.pixels(slice(CALIBRATION)), self.validation.labels[:CALIBRATION]
        generator = torch.Generator(images.device).manual_seed(self.recipe.seed)
        with attacked_in_eval_mode(classifier):
            versions = [
                attack.images(classifier, images, labels, generator=generator)
                for attack in (CLEAN, *self.recipe.attacks)
            ]
        return torch.cat(versions)

    def _seal(
        self,
        folder: Path,
        *,
        cells: list[Cell],
        unbounded: str | None,
        typical: Typical | None = None,
        disagreement: Disagreement | None = None,
        near_duplicates: NearDuplicates | None = None,
        proofs: Proofs | None = None,
    ) -> None:
        sealed(
            folder,
            {
                "name": self.recipe.name,
                "version": __version__,
                "dataset": self.recipe.dataset,
                "classes": self.recipe.data.classes,
                "input": {
                    "shape": self.recipe.data.input_shape,
                    "background": self.recipe.data.background,
                    "expects": self.recipe.data.expects,
                },
                "code": self.recipe.purifier.code,
                "latent": self.recipe.purifier.latent,
                "samples": self.recipe.samples,
                "recipe": self.recipe.model_dump(mode="json"),
                "table": [cell.model_dump() for cell in cells],
                "typical": typical and typical.model_dump(),
                "disagreement": disagreement and disagreement.model_dump(),
                "near_duplicates": near_duplicates and near_duplicates.model_dump(),
                "proofs": proofs and proofs.model_dump(),
                "unbounded": unbounded,
            },
        )


class _Kept:
    """A file of what was measured on the graphs of a bundle."""

    def __init__(self, path: Path, bundle: Bundle) -> None:
        self._path = path
        self._made_from = {name: bundle.manifest.files[name] for name in (FIRST_PASS, VOTE)}

    def read(self, parse: Callable[[Any], R]) -> R | None:
        """Return what `parse` makes of the content; None if there is no file, it is damaged, or of other graphs."""
        try:
            found = json.loads(self._path.read_bytes())
            if found["made_from"] == self._made_from:
                return parse(found)
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError):  # pydantic's error is a ValueError
            log.warning("%s is damaged: measuring again", self._path)
        return None

    def write(self, content: dict[str, Any]) -> None:
        durable.write(self._path, json.dumps({"made_from": self._made_from, **content}, indent=1))
