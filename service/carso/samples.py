"""The samples that a bundle may ship: images of its data set, clean and attacked, with the answers that they got.

    samples/samples.json    `Samples`: what each image is
    samples/*.png           the images

They are the first images of their split and not a choice, so some of the attacked ones fool CARSO too.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SAMPLES = "samples"  # the folder in a bundle
INDEX = f"{SAMPLES}/samples.json"

# What the attacker saw: `transfer` is the classifier of the first pass alone, `adaptive` is all of CARSO.
SampleKind = Literal["none", "transfer", "adaptive"]


class Sample(BaseModel):
    """One image, and the classes that the two paths answered when it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.png$")]  # in the folder
    index: int = Field(ge=0)  # of the clean image in its split
    label: int = Field(ge=0)  # the true class
    kind: SampleKind
    attack: str  # its name, as in a table of the adaptive or strong protocol; "none" for a clean image
    eps: float = Field(ge=0, le=1)  # how far a value may be from the clean image's, in units of the input's; 0: clean
    seed: int = Field(ge=0)  # of the vote that answered `robust_label`
    fast_label: int = Field(ge=0)
    robust_label: int = Field(ge=0)

    @property
    def fast_right(self) -> bool:
        """Whether the fast path answered the true class."""
        return self.fast_label == self.label

    @property
    def robust_right(self) -> bool:
        """Whether the robust path answered the true class."""
        return self.robust_label == self.label


class Samples(BaseModel):
    """The content of samples.json: the first images of a split, each followed by its attacked versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Literal["validation", "test"]
    risk: float = Field(ge=0, lt=1)  # of every count; its votes asked for are the bundle's
    images: tuple[Sample, ...] = Field(min_length=1)
