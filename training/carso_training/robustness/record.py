"""Writing what was measured into a bundle: its manifest and its model card, the adaptive figures first."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carso.bundle import Bundle, Cell, Recount, Threat, sealed
from carso.samples import INDEX, SAMPLES, Samples

from carso_training import durable
from carso_training.errors import RunError
from carso_training.robustness import figures
from carso_training.robustness.card import CARD, model_card
from carso_training.robustness.figures import Figure
from carso_training.robustness.published import RISK
from carso_training.robustness.system import recipe_of
from carso_training.robustness.table import PROTOCOLS

# Controls are of other systems than the bundle, but for those of int8
RECORDED = ("adaptive", "certified", "strong", "blackbox")
CLEAN = Threat(attack="none", norm="linf", eps=0, sees="nothing")


def record(folder: Path, found: Sequence[Figure]) -> tuple[Cell, ...]:
    """Write figures into the bundle in `folder`, in place of older ones of this kind, and seal it; return its table.

    The networks stay as they are. Raises RunError if a figure is of other networks or of other images than test images,
    BundleError if the bundle is damaged, and OSError.
    """
    bundle = Bundle.load(folder)
    mine = figures.networks(bundle)
    chosen = [figure for figure in figures.in_order(found) if figure.protocol in RECORDED]
    recounts = _recounts(found, votes=f"votes-{bundle.manifest.samples}") or bundle.manifest.recounts
    if not chosen:
        raise RunError("there are no figures to record. Make them with: carso-train evaluate BUNDLE --protocol full")
    for figure in found:
        if figure.measured.networks != mine:
            raise RunError(
                f"{figure.file_name} was measured on other networks than those of {folder}. Measure it again."
            )
        if figure.measured.split != "test":
            raise RunError(f"{figure.file_name} is of {figure.measured.split} images; a bundle tells of test images.")
    others = [cell for cell in bundle.manifest.table if cell.threat.attack not in PROTOCOLS]
    table = (*(figure.cell for figure in chosen), *others)
    rewrite(bundle, table=table, recounts=tuple(recounts))
    return table


def _recounts(found: Sequence[Figure], *, votes: str) -> list[Recount]:
    """Pair the controls that judged the adaptive attacks' images again in int8 with those that did so in float32.

    `votes` is the name of the latter. The clean images are the same at every eps, and told once.
    """
    controls = {
        (figure.cell.defence, figure.cell.threat.eps): figure
        for figure in figures.in_order(found)
        if figure.protocol == "controls"
    }
    recounts: list[Recount] = []
    for (defence, eps), int8 in controls.items():
        if defence != "int8" or (plain := controls.get((votes, eps))) is None:
            continue
        images = int8.cell.images
        if not recounts:
            clean = Recount(threat=CLEAN, images=images, correct_float32=plain.clean, correct_int8=int8.clean)
            recounts.append(clean)
        recounts.append(
            Recount(
                threat=int8.cell.threat,
                images=images,
                correct_float32=plain.cell.correct,
                correct_int8=int8.cell.correct,
            )
        )
    return recounts


def rewrite(
    bundle: Bundle,
    *,
    samples: Mapping[str, bytes] | None = None,
    files: Mapping[str, bytes | None] | None = None,
    **measured: Any,
) -> None:
    """Write a bundle again, beside the old one and swapped, with what was measured in its manifest and model card.

    `measured`: fields of the manifest, in place of the old ones. `samples`: the files of its samples by their names in
    the bundle, in place of the old ones; None: they stay. `files`: others to write, and None for those to remove. The
    networks stay as they are. Raises RecipeError if the manifest holds no recipe of this release, BundleError if the
    bundle would not load, and OSError.
    """
    folder = bundle.folder
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    manifest = bundle.manifest.model_copy(update=measured)
    shipped = bundle.samples
    if samples is not None:
        shipped = Samples.model_validate_json(samples[INDEX])
        shutil.rmtree(part / SAMPLES, ignore_errors=True)
        (part / SAMPLES).mkdir()
        for name, content in samples.items():
            (part / name).write_bytes(content)
    for name, content in (files or {}).items():
        if content is None:
            (part / name).unlink(missing_ok=True)
        else:
            (part / name).write_bytes(content)
    card = model_card(recipe_of(bundle), manifest.table, risk=RISK, typical=manifest.typical, samples=shipped)
    (part / CARD).write_text(card)
    sealed(part, manifest.model_dump(mode="json", exclude={"schema_version", "files"}))
    Bundle.load(part)
    folder.replace(old)
    part.replace(folder)
    durable.sync_folder(folder.parent)
    shutil.rmtree(old)
