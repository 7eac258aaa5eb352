"""`carso-train`, the same as `python -m training`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from carso.bundle import Bundle, BundleError
from lightning_fabric import Fabric
from pydantic import ValidationError
from rich.console import Console
from rich.logging import RichHandler

from carso_training import data
from carso_training.evaluate import pipeline_of
from carso_training.recipe import PRESETS, Recipe
from carso_training.run import Run, RunError, Split
from carso_training.samples import write_samples
from carso_training.table import WIDTH, as_rich

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

DataFolder = Annotated[
    Path | None, typer.Option("--data", envvar="CARSO_DATA", help="Folder with the four IDX files, plain or .gz.")
]
Preset = Annotated[
    str,
    typer.Argument(help=f"One of {', '.join(PRESETS)}; or a JSON file with a recipe of your own.", metavar="RECIPE"),
]
Quick = Annotated[bool, typer.Option("--quick", help="The preset's small variant: minutes on two cores.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**31, help="Of everything random in training.")]
Folder = Annotated[Path | None, typer.Option("--folder", help="Where the run lives. [default: runs/<preset>]")]
Accelerator = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where it is there.")]
Precision = Annotated[
    Literal["recipe", "bf16", "float32"], typer.Option(help="Of the purifier's forward pass in training.")
]
Devices = Annotated[int, typer.Option(min=1, help="Processes, each on its own device (distributed data parallel).")]


@app.command("data")
def fetch_data(source: DataFolder = None) -> None:
    """Fetch MNIST into the cache and verify it."""
    print(data.ensure(source=source))


@app.command()
def run(
    preset: Preset,
    *,
    quick: Quick = False,
    seed: Seed = None,
    folder: Folder = None,
    source: DataFolder = None,
    accelerator: Accelerator = "auto",
    precision: Precision = "recipe",
    devices: Devices = 1,
) -> None:
    """Train, export and measure a system; the result is a bundle. Stop it at any time: the same command goes on."""
    recipe = _recipe(preset, quick, seed)
    if precision != "recipe":
        recipe = recipe.model_copy(update={"purification_bf16": precision == "bf16"})
    opened = _open(recipe, folder, source, accelerator, devices)
    bundle = opened.bundle()
    if opened.fabric.is_global_zero:
        print(bundle)


@app.command()
def presets() -> None:
    """Print the presets as JSON: a start for a recipe file of your own."""
    print(json.dumps({name: recipe.model_dump(mode="json") for name, recipe in PRESETS.items()}, indent=2))


@app.command()
def evaluate(
    preset: Preset,
    *,
    split: Annotated[Split, typer.Option(help="Choose schedules on `validation`; `test` is only ever measured.")],
    quick: Quick = False,
    seed: Seed = None,
    folder: Folder = None,
    source: DataFolder = None,
    accelerator: Accelerator = "auto",
) -> None:
    """Measure a finished run's bundle on a split, beside the published numbers."""
    opened = _open(_recipe(preset, quick, seed), folder, source, accelerator, 1)
    bundle = Bundle.load(opened.bundle())
    Console(width=WIDTH).print(as_rich(opened.measure(bundle, *opened.classifiers(), split=split)))


@app.command()
def samples(
    preset: Preset,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")],
    count: Annotated[int, typer.Option(min=1, max=10)] = 3,
    quick: Quick = False,
    folder: Folder = None,
    source: DataFolder = None,
) -> None:
    """Write sample digits, clean and attacked, of a finished run."""
    opened = _open(_recipe(preset, quick, None), folder, source, "cpu", 1)
    written = write_samples(
        out,
        classifier=opened.classifiers()[1],
        pipeline=pipeline_of(Bundle.load(opened.bundle())),
        data=opened.test,
        count=count,
        samples=opened.recipe.samples,
        seed=opened.recipe.seed,
    )
    print(*written, sep="\n")


def _open(recipe: Recipe, folder: Path | None, source: Path | None, accelerator: str, devices: int) -> Run:
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    if fabric.is_global_zero:
        data.ensure(source=source)
    fabric.barrier()
    train, test = data.load("train", source=source), data.load("test", source=source)
    return Run(recipe, folder or Path("runs") / recipe.name, fabric, train=train, test=test)


def _recipe(preset: str, quick: bool, seed: int | None) -> Recipe:
    if preset.endswith(".json"):
        try:
            recipe = Recipe.model_validate_json(Path(preset).read_bytes())
        except (OSError, ValidationError) as e:
            raise RunError(f"{preset} is not a recipe: {e}") from None
        return recipe if seed is None else recipe.model_copy(update={"seed": seed})
    name = f"{preset}-quick" if quick and not preset.endswith("-quick") else preset
    if name not in PRESETS:
        raise RunError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name] if seed is None else PRESETS[name].model_copy(update={"seed": seed})


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logging.getLogger("training").setLevel(logging.INFO)
    try:
        app()
    except (RunError, BundleError, data.DataUnavailableError, ValueError) as e:
        print(f"carso-train: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("carso-train: stopped; the same command goes on from the last finished epoch", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
