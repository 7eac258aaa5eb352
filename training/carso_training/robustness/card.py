"""The model card of a bundle, for people."""

from __future__ import annotations

from collections.abc import Sequence

from carso.bundle import Cell, Kind, Typical
from carso.samples import Samples

from carso_training.recipe import Hardening, Recipe, Strengths
from carso_training.robustness.table import as_markdown
from carso_training.robustness.typical import as_markdown as typical_as_markdown

CARD = "MODEL_CARD.md"  # the file in a bundle
TEXT = """\
# {name}

A CARSO system (a classifier and a purifier) for {dataset}. It tells {classes} classes apart ({class_names}), from \
images of shape {shape} with values in [0, 1]. `carso-train run {name}` trained it with seed {seed}. The whole recipe \
is in `manifest.json`.

The method is described in E. Ballarin, *Counteradversarial Recall of Synthetic Observations* (2022), and the networks \
are {networks}. The weights are an exponential moving average over the steps of the training.{hardening}

## Measured accuracy

Accuracy in percent, with 95 % (Wilson) intervals, on {images} test images. No test image took part in training or in \
any choice. Each image was given up to {samples} votes. A count ends early at risk {risk:g}: each answer differs from \
that of the full count with at most that probability.

{table}

{explanation}{typical}

## Use

Images must be like those it was trained on: {expects} An image that is not, such as one of the other polarity, gets \
an answer all the same.

The system is meant for research, teaching and tests on {dataset}. {norms} Nothing is known of its accuracy under \
other threats, or on images that are not like those of {dataset}.

## Files

- `first_pass.onnx`, `vote.onnx` and `vote_int8.onnx` are what the service runs.
- The files `*.safetensors` hold the same weights, for further training and white-box evaluation. \
`carso_training.export.weights` reads them into PyTorch.
- `self_test.npz` holds inputs with known answers, which the service checks at start.
{shipped}- `manifest.json` lists the SHA-256 of each file.
"""

SAMPLES = """\
- `samples/` holds the first {count} images of the {split} set, clean and attacked at several strengths, with the \
answers that they got. They are not chosen, so some of them fool CARSO.
"""

TYPICAL = """

## Typical images

An answer says whether its image is typical, which is to say like those that the purifier knows. {table}"""

HARDENED = """

After the published training, the system was *hardened*: its networks were trained on together, end to end, on clean \
images, on images attacked through both passes at eps {eps}, and on images attacked on the first pass alone at eps \
{first_pass_eps}. The second pass became a classifier of its own, which votes. In the tables, *IAT* is the hardened \
first pass."""
HARDENED_BEHIND = """

The classifier of the first pass was trained {how}. It then stayed as it was, while all that comes after it was \
*hardened*: trained on, end to end, on clean images, on images attacked through both passes at eps {eps}, and on \
images attacked on the first pass alone at eps {first_pass_eps}. The second pass became a classifier of its own, which \
votes. In the tables, *IAT* is the classifier of the first pass."""
BY_ATTACKS = "by strong attacks alone"
FOR_BOUNDS = """\
for interval bounds up to eps {eps:.2f}, so that for many images its label can be proven to be the same for every \
image within a smaller eps"""
NETWORKS = {"fcn": "those of that work", "conv": "convolutional"}

EXPLANATIONS: dict[Kind, str] = {
    "white-box": "Columns *none* (the undefended classifier) and *IAT* (the adversarially trained classifier) show "
    "**white-box accuracy**: each classifier answers for images made against itself.",
    "transfer": "Column *CARSO* shows **transfer accuracy**: the images were made against the IAT classifier alone, "
    "and CARSO classified them. It says nothing about an attacker who differentiates through the whole of CARSO.",
    "adaptive": "**Adaptive accuracy**, in column *CARSO* of the first table, is that against an attacker who knows "
    "and differentiates through the whole of the defence, its randomness included. It is the figure to go by.",
    "black-box": "**Black-box accuracy** is that against an attacker who sees only answers.",
}
EFFORT = (
    "The first table was measured with effort *{effort}* on {images} test images. `carso-train evaluate` makes it "
    "again, and tries harder with `--effort thorough`."
)
PROVEN = (
    "What is *proven* needs no attack: `first_pass_with_bounds.onnx` computes that the classifier gives all images "
    "within eps the same label, and these labels are right."
)
FAILED_ATTACK = (
    "Accuracy above chance at eps 0.50 means that the attack failed, not that the defence held: 40 steps of 0.01 "
    "cannot even cross that ball."
)
NORMS = {"linf": "L-infinity", "l2": "L2"}


def model_card(
    recipe: Recipe,
    cells: Sequence[Cell],
    *,
    risk: float,
    typical: Typical | None = None,
    samples: Samples | None = None,
) -> str:
    """Write the card of a system in Markdown, from its recipe, its measured cells (at least one), which images are
    typical, and the samples that it ships.
    """
    kinds = {cell.kind for cell in cells}
    sentences = [text for kind, text in EXPLANATIONS.items() if kind in kinds]
    efforts = {(str(c.threat.settings.get("effort")), c.images) for c in cells if c.kind == "adaptive"}
    sentences += [EFFORT.format(effort=effort, images=images) for effort, images in sorted(efforts) if effort != "None"]
    if any(cell.threat.attack == "certified" for cell in cells):
        sentences.append(PROVEN)
    if any(cell.threat.name == "pgd-0.50" for cell in cells):
        sentences.append(FAILED_ATTACK)
    norms = dict.fromkeys(NORMS[cell.threat.norm] for cell in cells if cell.kind != "clean")
    images = dict.fromkeys(cell.images for cell in cells)
    return TEXT.format(
        name=recipe.name,
        networks=NETWORKS[recipe.classifier.network],
        dataset=recipe.data.title,
        classes=len(recipe.data.classes),
        class_names=", ".join(recipe.data.classes),
        shape=list(recipe.data.input_shape),
        seed=recipe.seed,
        expects=recipe.data.expects,
        images=" or ".join(str(count) for count in images),
        samples=recipe.samples,
        risk=risk,
        hardening="" if recipe.hardening is None else _hardened(recipe, recipe.hardening),
        table=as_markdown(cells),
        explanation=" ".join(sentences),
        typical="" if typical is None else TYPICAL.format(table=typical_as_markdown(typical)),
        norms=f"The attacks are {' and '.join(norms)} attacks." if norms else "",
        shipped="" if samples is None else _shipped(samples),
    )


def _shipped(samples: Samples) -> str:
    return SAMPLES.format(count=len({sample.index for sample in samples.images}), split=samples.split)


def _hardened(recipe: Recipe, hardening: Hardening) -> str:
    def listed(strengths: Strengths) -> str:
        return " or ".join(f"{eps:.2f}" for eps, _ in strengths)

    given = {"eps": listed(hardening.eps), "first_pass_eps": listed(hardening.first_pass_eps)}
    if hardening.train_first_pass:
        return HARDENED.format(**given)
    certified = recipe.certified_training
    how = BY_ATTACKS if certified is None else FOR_BOUNDS.format(eps=certified.eps)
    return HARDENED_BEHIND.format(how=how, **given)
