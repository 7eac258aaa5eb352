"""The command `carso-train`: train, measure and export a system."""

from __future__ import annotations

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from carso.bundle import BundleError
from carso.inference.runtime import InstallationError, check_runtime
from carso.inference.sessions import DeviceError
from carso.version import __version__
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.logging import RichHandler

from carso_training.datasets import dataset
from carso_training.errors import DeviceUnavailableError, RecipeError, TrainingError
from carso_training.recipe import PRESETS, Recipe
from carso_training.robustness.samples import write_samples
from carso_training.robustness.table import WIDTH, as_rich
from carso_training.robustness.voting import pipeline_of
from carso_training.run import Run, RunFolder, Split

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

INTERRUPTED = 130  # as a shell reports Ctrl-C

DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data", envvar="CARSO_DATA", help="A folder with the data set's files, plain or .gz; it is tried first."
    ),
]
RecipeName = Annotated[
    str,
    typer.Argument(help=f"One of {', '.join(PRESETS)}; or a JSON file with a recipe of your own.", metavar="RECIPE"),
]
Quick = Annotated[bool, typer.Option("--quick", help="Use the preset's small variant: minutes on two cores.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**31, help="Decides everything random in training.")]
Folder = Annotated[Path | None, typer.Option("--folder", help="Where the run lives. [default: runs/<recipe>]")]
Accelerator = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA if it is there, else the CPU.")]
Precision = Annotated[
    Literal["recipe", "bf16", "float32"], typer.Option(help="Of the purifier's forward pass in training.")
]
Devices = Annotated[int, typer.Option(min=1, help="Processes, each on its own device (distributed data parallel).")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carso-train {__version__}")
        raise typer.Exit


@app.callback()
def carso_train(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train a classifier and its purifier, measure them under attack, and export a bundle for the service."""


@app.command("data")
def fetch_data(
    name: Annotated[str, typer.Argument(help="A data set: mnist or fashion-mnist.")] = "mnist",
    *,
    source: DataFolder = None,
) -> None:
    """Fetch a data set into the cache, verify it, and print the folder."""
    typer.echo(dataset(name).ensure(given=source))


@app.command()
def run(
    recipe: RecipeName,
    *,
    quick: Quick = False,
    seed: Seed = None,
    folder: Folder = None,
    source: DataFolder = None,
    accelerator: Accelerator = "auto",
    precision: Precision = "recipe",
    devices: Devices = 1,
) -> None:
    """Train, export and measure a system, and print the bundle's folder.

    You can stop it at any time; run the same command again to resume.
    """
    chosen = _recipe(recipe, quick=quick, seed=seed)
    if precision != "recipe":
        chosen = chosen.model_copy(update={"purification_bf16": precision == "bf16"})
    try:
        opened = _open(chosen, folder, source=source, accelerator=accelerator, devices=devices)
        bundle = opened.export(opened.train())
    except KeyboardInterrupt:
        _tell("stopped. Run the same command again to resume from the last finished epoch")
        raise typer.Exit(INTERRUPTED) from None
    if opened.fabric.is_global_zero:
        typer.echo(bundle)


@app.command()
def presets() -> None:
    """Print the presets as JSON: a start for a recipe file of your own."""
    typer.echo(json.dumps({name: recipe.model_dump(mode="json") for name, recipe in PRESETS.items()}, indent=2))


@app.command()
def evaluate(
    recipe: RecipeName,
    *,
    split: Annotated[Split, typer.Option(help="Choose schedules on `validation`; `test` is only ever measured.")],
    quick: Quick = False,
    seed: Seed = None,
    folder: Folder = None,
    source: DataFolder = None,
    accelerator: Accelerator = "auto",
) -> None:
    """Measure a finished run's bundle on a split, beside the published numbers. Nothing is trained."""
    opened = _open(
        _recipe(recipe, quick=quick, seed=seed), folder, source=source, accelerator=accelerator, finished=True
    )
    system, bundle = opened.load()
    for table in as_rich(opened.measure(system, bundle, split=split)):
        Console(width=WIDTH).print(table)


@app.command()
def samples(
    recipe: RecipeName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")],
    count: Annotated[int, typer.Option(min=1, max=10)] = 3,
    quick: Quick = False,
    seed: Seed = None,
    folder: Folder = None,
    source: DataFolder = None,
) -> None:
    """Write sample images, clean and attacked, of a finished run. Nothing is trained."""
    opened = _open(_recipe(recipe, quick=quick, seed=seed), folder, source=source, accelerator="cpu", finished=True)
    system, bundle = opened.load()
    written = write_samples(
        out,
        classifier=system.classifier,
        pipeline=pipeline_of(bundle),
        data=opened.test,
        count=count,
        samples=opened.recipe.samples,
        seed=opened.recipe.seed,
    )
    for path in written:
        typer.echo(path)


def _open(
    recipe: Recipe,
    folder: Path | None,
    *,
    source: Path | None,
    accelerator: str,
    devices: int = 1,
    finished: bool = False,
) -> Run:
    """Start the processes, fetch the data and open the run. `finished`: first refuse a run that is not."""
    folder = folder or Path("runs") / recipe.name
    if finished:
        RunFolder(recipe, folder).check_finished()
    gpus = torch.cuda.device_count()
    if accelerator == "cuda" and devices > gpus:
        raise DeviceUnavailableError(
            f"--accelerator cuda: PyTorch {torch.__version__} finds {gpus or 'no'} usable GPUs, not {devices}. Check "
            "nvidia-smi and that this PyTorch was built for CUDA, or give --accelerator cpu"
        )
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    if fabric.is_global_zero:
        recipe.data.ensure(given=source)
    fabric.barrier()
    train, test = (recipe.data.load(split, given=source) for split in ("train", "test"))
    return Run(recipe, folder, fabric, train=train, test=test)


def _recipe(name: str, *, quick: bool, seed: int | None) -> Recipe:
    changed = {} if seed is None else {"seed": seed}
    if name.endswith(".json"):
        return Recipe.read(Path(name)).model_copy(update=changed)
    preset = f"{name}-quick" if quick and not name.endswith("-quick") else name
    if preset not in PRESETS:
        raise RecipeError(f"there is no preset {preset!r}. Give one of {', '.join(PRESETS)}, or a JSON file")
    return PRESETS[preset].model_copy(update=changed)


def main() -> None:
    """Run the command line. Exits with 0, with 1 for what failed, with 2 for wrong usage, with 130 after Ctrl-C.

    What a user can mend is told in one line on standard error. Anything else is a fault of ours and shows a traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logging.getLogger("carso_training").setLevel(logging.INFO)
    try:
        check_runtime()
        app(prog_name="carso-train")
    except (TrainingError, BundleError, DeviceError, InstallationError, MisconfigurationException) as e:
        _tell(str(e))
    except OSError as e:
        _tell(_complaint(e))
    sys.exit(1)


def _complaint(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    what = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{what}. Make room there, then run the same command again to resume"
    return f"{what}. Mend that, or give another folder, then run the same command again"


def _tell(what: str) -> None:
    print(f"carso-train: {what}", file=sys.stderr)  # noqa: T201
