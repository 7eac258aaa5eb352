"""The model card of a bundle, for people."""

from __future__ import annotations

from collections.abc import Sequence

from carso.bundle import Cell

from carso_training.recipe import Recipe
from carso_training.table import as_markdown

CARD = """\
# {name}

A CARSO system (classifier and purifier) for {dataset}: {classes} classes, images of shape {shape} with values in \
[0, 1]. Trained by `carso-train run {name}` with seed {seed}; the whole recipe is in `manifest.json`.

Method: E. Ballarin, *Counteradversarial Recall of Synthetic Observations* (2022). The networks are those of the \
published system. The weights kept are an exponential moving average over training steps.

## Measured

Accuracy in percent with 95 % (Wilson) intervals, on {images} test images, none of which took part in training or in \
any choice. Votes asked for: {samples}; a count ends early at risk {risk:g}, so that each answer differs from the \
full count's with at most that probability.

{table}

Columns *none* (undefended classifier) and *IAT* (adversarially trained) are white-box: each answers for images made \
against itself. Column *CARSO* is **transfer accuracy**: the images made against the IAT classifier, classified by \
CARSO. It says nothing of an attacker who differentiates through the whole of CARSO. Accuracy above chance at eps \
0.50 means that the attack failed, not that the defence held: 40 steps of 0.01 cannot even cross that ball.

## Use

For research, teaching and tests on {dataset}. The attacks are L-infinity; nothing is known of other threat models, \
nor of images that are no digits: every image gets an answer.

## Files

`first_pass.onnx` and `vote.onnx` are what the service runs. `classifier.safetensors`, `code_encoder.safetensors` \
and `decoder.safetensors` hold the same weights for further training and white-box evaluation \
(`training/networks.py`). `self_test.npz` holds known answers. `manifest.json` lists the SHA-256 of each file.
"""


def model_card(recipe: Recipe, cells: Sequence[Cell], *, risk: float) -> str:
    return CARD.format(
        name=recipe.name,
        dataset=recipe.dataset.upper(),
        classes=recipe.classifier.classes,
        shape=list(recipe.classifier.input_shape),
        seed=recipe.seed,
        images=cells[0].images,
        samples=recipe.samples,
        risk=risk,
        table=as_markdown(cells),
    )
