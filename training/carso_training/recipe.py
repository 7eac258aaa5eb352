"""What a run is: every number that decides a trained system, in one value, and the named presets.

A recipe is written into the bundle's manifest, so that a bundle says how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from carso.complaints import first_complaint
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from carso_training.attacks import CLEAN, Attack, attack_named
from carso_training.datasets import DATASETS, DatasetSpec
from carso_training.errors import RecipeError
from carso_training.networks import AnyClassifierConfig, AnyPurifierConfig, classifier_config, purifier_config


class Schedule(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How one stage is trained; the weights kept are an exponential moving average."""

    epochs: int = Field(gt=0)
    peak_lr: float = Field(gt=0)
    batch_size: int = Field(default=256, gt=0)  # clean images per step; their attacked versions come on top
    # one-cycle: the learning rate rises to its peak and falls to nothing. steps: it starts at its peak, and is a fifth
    # of it from 70 % of the training on, and a twenty-fifth from 85 % on
    rate: Literal["one-cycle", "steps"] = "one-cycle"
    warmup: float = Field(default=0.3, gt=0, lt=1)  # share of the steps on which a one-cycle rate rises
    averaging: float = Field(default=0.999, ge=0, lt=1)  # decay of the moving average, per step
    weight_decay: float = Field(default=0.0, ge=0)
    # muon: weight matrices by Muon, and the rest by AdamW. On a CPU it needs bfloat16 products to be fast
    optimizer: Literal["radam", "adamw", "muon"] = "radam"


def _drawn(strengths: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if not sum(share for _, share in strengths) > 0:
        raise ValueError("the shares add up to 0")
    return strengths


Eps = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0)]
# (eps, share): each image is attacked at one of these strengths, drawn with chances in proportion to the shares
Strengths = Annotated[tuple[tuple[Eps, Share], ...], Field(min_length=1), AfterValidator(_drawn)]


class RobustTraining(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Training the classifier by PGD alone, with the schedule `adversarial`, in place of the published training."""

    eps: Strengths = ((0.20, 0.15), (0.36, 0.85))  # above what is tested: the figures at what is tested gain by it
    steps: int = Field(default=7, gt=0)
    clean: float = Field(default=0.3, ge=0)  # weight of the clean images beside the attacked ones
    rise: float = Field(default=0.25, ge=0, lt=1)  # share of the training in which the attacks grow to full strength


class CertifiedTraining(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Training the classifier for interval bounds, with the schedule `adversarial`, so that its answers can be proven.

    See fitting/certified.py.
    """

    eps: Eps = 0.4  # above what is tested: the figures at what is tested gain by it
    rise: float = Field(default=1 / 3, ge=0, lt=1)  # share of the training in which eps grows to its full size
    clean: float = Field(default=0.5, ge=0, lt=1)  # weight of the clean images from then on; the bounds have the rest


class Hardening(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Training all networks on together, end to end, against attacks that see all of them.

    The defaults are the settings that did best on validation images: see docs/experiments.md.
    """

    schedule: Schedule
    eps: Strengths = ((0.15, 0.4), (0.34, 0.6))  # of attacks through both passes
    first_pass_eps: Strengths = ((0.15, 0.6), (0.30, 0.4))  # of attacks on the first pass alone
    first_pass_images: int = Field(default=192, gt=0)  # how many images of a batch are also attacked there, at most
    steps: int = Field(default=7, gt=0)  # of each attack
    pixel: float = Field(default=0.01, ge=0)  # weight of the pixelwise loss, which is summed over the pixels
    first: float = Field(default=0.5, ge=0)  # weight of the first pass's own cross-entropy
    train_first_pass: bool = True  # False: it stays as it is


def _foreseen(weights: dict[str, float]) -> dict[str, float]:
    for name in weights:
        attack_named(name)
    if CLEAN.name not in weights or len(weights) < 2:
        raise ValueError("give `clean` and at least one attack")
    if not sum(weights.values()) > 0:
        raise ValueError("the weights add up to 0")
    return weights


# The published system foresees these attacks. A recipe's own weights may be others, and its attacks too.
FORESEEN = {CLEAN.name: 1.0, "fgsm-0.15": 1.0, "fgsm-0.30": 1.0, "pgd-0.15": 1.0, "pgd-0.30": 1.0}


class Recipe(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """One system. What the data set says (shape, classes, mean, ...) need not be repeated for the networks."""

    name: str = Field(min_length=1)
    dataset: str = "mnist"
    seed: int = Field(default=0, ge=0, le=2**31)
    train_images: int | None = Field(default=None, gt=0)  # how many of the training images to use; None: all
    validation_images: int = Field(default=5000, gt=0)  # held out of the training images, to choose schedules on
    test_images: int | None = Field(default=None, gt=0)  # None: all
    classifier: AnyClassifierConfig
    purifier: AnyPurifierConfig
    # The classifier that votes, where hardening trains one: from fresh weights. None: a copy of the first pass's,
    # trained on. A smaller one makes votes cheaper
    second_pass: AnyClassifierConfig | None = None
    undefended: Schedule
    adversarial: Schedule
    # The clean batch and the attacks that both trainings foresee, with the weight of each in the classifier's loss;
    # the weights are normalised to one
    foreseen: Annotated[dict[str, Annotated[float, Field(ge=0)]], AfterValidator(_foreseen)] = FORESEEN
    training_attack_steps: int = Field(default=10, gt=0)  # of iterative attacks, while the classifier is trained
    # By how many pixels the robust training, the certified one and the hardening move each image at most, each way
    shifts: int = Field(default=0, ge=0)
    robust_training: RobustTraining | None = None  # of the classifier; None: the published one, by the foreseen attacks
    certified_training: CertifiedTraining | None = None  # of the classifier, in place of either
    purification: Schedule
    # The purifier's forward pass, the robust training and the hardening in bfloat16, where the device multiplies it
    purification_bf16: bool = True
    hardening: Hardening | None = None  # a last stage; None: the system as published
    samples: int = Field(default=1500, gt=0)  # votes asked for by default

    @property
    def data(self) -> DatasetSpec:
        """What the project knows of the data set."""
        return DATASETS[self.dataset]

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """The foreseen attacks, in order, without the clean images."""
        return tuple(attack_named(name) for name in self.foreseen if name != CLEAN.name)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe from a JSON file. Raises RecipeError, which names the file, the field and what is wrong."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as e:
            raise RecipeError(f"{path} cannot be read ({e.strerror})") from None
        except ValidationError as e:
            raise RecipeError(f"{path} is not a recipe: {first_complaint(e)}") from None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Give the networks the facts of the data set, and the purifier those of the classifier."""
        if not isinstance(given, Mapping):
            return given
        name = given.get("dataset", cls.model_fields["dataset"].default)
        if name not in DATASETS:
            raise ValueError(f"dataset: there is no {name!r}. There are: {', '.join(DATASETS)}")
        data = DATASETS[name]
        given = {"classifier": {}, "purifier": {}} | dict(given)
        for name in ("classifier", "second_pass"):
            if isinstance(given.get(name), Mapping):
                facts = {"classes": len(data.classes), "mean": data.mean, "std": data.std}
                given[name] = classifier_config({"input_shape": data.input_shape} | facts | given[name])
        if isinstance(given["purifier"], Mapping):
            facts = {"representation": given["classifier"].representation}
            given["purifier"] = purifier_config({"input_shape": data.input_shape} | facts | given["purifier"])
        return given

    @model_validator(mode="after")
    def _fitting(self) -> Recipe:
        for found, expected, what in (
            (self.classifier.input_shape, self.data.input_shape, "classifier.input_shape"),
            (self.classifier.classes, len(self.data.classes), "classifier.classes"),
            (self.purifier.input_shape, self.data.input_shape, "purifier.input_shape"),
            (self.purifier.representation, self.classifier.representation, "purifier.representation"),
            *self._facts_of_second_pass(),
        ):
            if found != expected:
                raise ValueError(f"{what} is {found}; it must be {expected} for {self.data.title} and this classifier")
        if self.second_pass is not None and self.hardening is None:
            raise ValueError("second_pass is trained by hardening only: give hardening, or leave second_pass out")
        if self.certified_training is not None:
            if self.robust_training is not None:
                raise ValueError("give robust_training or certified_training, not both")
            if not self.classifier.trains_for_bounds:
                raise ValueError(
                    f"certified_training: the network {self.classifier.network} cannot be trained for bounds; use conv"
                )
        return self

    def _facts_of_second_pass(self) -> list[tuple[object, object, str]]:
        if self.second_pass is None:
            return []
        return [
            (self.second_pass.input_shape, self.data.input_shape, "second_pass.input_shape"),
            (self.second_pass.classes, len(self.data.classes), "second_pass.classes"),
        ]


def _presets() -> dict[str, Recipe]:
    published = {
        "name": "mnist-fcn-published",
        "validation_images": 3000,
        "undefended": Schedule(epochs=20, peak_lr=0.01),
        "adversarial": Schedule(epochs=60, peak_lr=0.02),
        # Chosen on validation images between (1.5, 1, 0.8, 1.2, 0.8), which gave away clean accuracy for more than was
        # needed at eps 0.30, and (2, 1, 0.3, 1.5, 0.4), which did the reverse
        "foreseen": dict(zip(FORESEEN, (1.7, 1.0, 0.7, 1.25, 0.7), strict=True)),
        "purification": Schedule(epochs=40, peak_lr=0.003, batch_size=128),
    }
    # The same system, hardened. Best on validation images of what was tried: see docs/experiments.md
    cycle = Schedule(
        epochs=16,
        peak_lr=3e-3,
        batch_size=512,
        warmup=0.06,
        averaging=0.998,
        weight_decay=1e-4,
        optimizer="muon",
    )
    hardened = published | {"name": "mnist-fcn", "hardening": Hardening(schedule=cycle)}
    # A third of the multiplications of a vote: the decoder has most of them
    small = hardened | {
        "name": "mnist-fcn-small",
        "purifier": {"decoder": (400, 480)},
        "hardening": Hardening(schedule=cycle.model_copy(update={"epochs": 24})),
    }
    adamw = {"batch_size": 512, "warmup": 0.15, "averaging": 0.998, "optimizer": "adamw"}
    muon = adamw | {"peak_lr": 3e-3, "optimizer": "muon"}
    strong = ((0.20, 0.15), (0.36, 0.85))
    # A longer average would mix the weights of several epochs, and in so few epochs these move too far for that
    short = muon | {"averaging": 0.95, "weight_decay": 1e-4}
    conv = {
        "name": "mnist-conv",
        "validation_images": 3000,
        "classifier": {"network": "conv", "channels": (48, 64), "hidden": 112},
        # Votes by small dense networks: as strong as by convolutional ones, for an eighth of the multiplications
        "purifier": {"code_encoder": (128, 64), "decoder": (256, 384), "decoder_dropout": (0.0, 0.0)},
        "second_pass": {"network": "fcn", "hidden": (128,), "dropout": 0.0},
        "undefended": Schedule(epochs=3, peak_lr=2e-3, **adamw),
        "adversarial": Schedule(epochs=16, weight_decay=5e-4, **muon),
        "robust_training": RobustTraining(eps=strong, rise=0.2),
        "foreseen": {CLEAN.name: 1.0, "fgsm-0.30": 1.0},  # of the purifier's first training, which hardening follows
        # In so few steps, a longer average would be of weights that know nothing yet
        "purification": Schedule(epochs=2, peak_lr=2e-3, **adamw | {"averaging": 0.95}),
        "hardening": Hardening(
            schedule=Schedule(epochs=5, **short),
            eps=strong,
            first_pass_eps=strong,  # it stays as it is, so attacks on it cost it nothing
            first_pass_images=384,
            train_first_pass=False,
        ),
    }
    # Of what a short search on validation images tried: steep thresholds matter most. See docs/experiments.md
    certified = conv | {
        "name": "mnist-certified",
        "classifier": {"network": "conv", "steepness": 60.0, "channels": (16, 32), "hidden": 128},
        "purifier": {"code_encoder": (96, 64), "decoder": (128, 256), "decoder_dropout": (0.0, 0.0)},
        "undefended": Schedule(epochs=1, peak_lr=2e-3, **adamw | {"averaging": 0.95}),
        "adversarial": Schedule(epochs=30, peak_lr=1e-3, batch_size=128, rate="steps", optimizer="adamw"),
        "robust_training": None,
        "certified_training": CertifiedTraining(),
        "purification": Schedule(epochs=8, peak_lr=2e-3, **adamw | {"averaging": 0.95}),
        "hardening": Hardening(schedule=Schedule(epochs=5, **short), eps=strong, train_first_pass=False),
    }
    quick = {
        "name": "mnist-fcn-quick",
        "train_images": 6000,
        "validation_images": 500,
        "test_images": 100,
        "undefended": Schedule(epochs=3, peak_lr=0.01, batch_size=128, averaging=0.97),
        "adversarial": Schedule(epochs=5, peak_lr=0.01, batch_size=128, averaging=0.97),
        "training_attack_steps": 5,
        "purification": Schedule(epochs=3, peak_lr=0.003, batch_size=64, averaging=0.97),
    }
    given = (published, quick, hardened, small, conv, certified)
    return {recipe.name: recipe for recipe in map(Recipe.model_validate, given)}


PRESETS = _presets()
