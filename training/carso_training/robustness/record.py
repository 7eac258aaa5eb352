"""Writing measured figures into a bundle: its table and its model card, the adaptive figures first."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from carso.bundle import Bundle, Cell, sealed

from carso_training import durable
from carso_training.errors import RunError
from carso_training.recipe import Recipe
from carso_training.robustness import figures
from carso_training.robustness.card import model_card
from carso_training.robustness.figures import Figure
from carso_training.robustness.published import RISK
from carso_training.robustness.table import PROTOCOLS

RECORDED = ("adaptive", "strong", "blackbox")  # controls are of other systems than the bundle
CARD = "MODEL_CARD.md"


def record(folder: Path, found: Sequence[Figure]) -> tuple[Cell, ...]:
    """Write figures into the bundle in `folder`, in place of older ones of this kind, and seal it; return its table.

    The networks stay as they are. Raises RunError if a figure is of other networks or of other images than test images,
    BundleError if the bundle is damaged, and OSError.
    """
    bundle = Bundle.load(folder)
    mine = figures.networks(bundle)
    chosen = [figure for figure in figures.in_order(found) if figure.protocol in RECORDED]
    if not chosen:
        raise RunError("there are no figures to record. Make them with: carso-train evaluate BUNDLE --protocol full")
    for figure in chosen:
        if figure.measured.networks != mine:
            raise RunError(
                f"{figure.file_name} was measured on other networks than those of {folder}. Measure it again."
            )
        if figure.measured.split != "test":
            raise RunError(f"{figure.file_name} is of {figure.measured.split} images; a bundle tells of test images.")
    manifest = bundle.manifest
    others = [cell for cell in manifest.table if cell.threat.attack not in PROTOCOLS]
    table = (*(figure.cell for figure in chosen), *others)
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    (part / CARD).write_text(
        model_card(Recipe.model_validate(manifest.recipe), table, risk=RISK, typical=manifest.typical)
    )
    fields = manifest.model_dump(mode="json", exclude={"schema_version", "files", "table"})
    sealed(part, {**fields, "table": [cell.model_dump() for cell in table]})
    Bundle.load(part)
    folder.replace(old)
    part.replace(folder)
    durable.sync_folder(folder.parent)
    shutil.rmtree(old)
    return table
