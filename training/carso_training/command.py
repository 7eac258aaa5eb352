"""The command `carso-train`: train, measure and export a system."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from carso import CarsoError, Client, Unavailable
from carso.bundle import BOUNDS, EARLIER_BOUNDS, MANIFEST, Bundle, BundleError
from carso.choices import DEFAULT_EPS, LEAST_EPS
from carso.inference.abilities import DeviceError
from carso.inference.duplicates import REMEMBERED
from carso.inference.runtime import InstallationError, check_runtime
from carso.samples import SAMPLES
from carso.version import __version__
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.logging import RichHandler

from carso_training import durable
from carso_training.datasets import dataset
from carso_training.errors import DeviceUnavailableError, RecipeError, RunError, TrainingError
from carso_training.export.files import bounds_of
from carso_training.export.weights import classifier_of, purifier_of
from carso_training.networks.bounds import UnboundedLayerError
from carso_training.recipe import PRESETS, Recipe
from carso_training.robustness import plots
from carso_training.robustness.blackbox import Service
from carso_training.robustness.certified import certified, proofs_of
from carso_training.robustness.disagreement import disagreement_of
from carso_training.robustness.duplicates import near_duplicates_of
from carso_training.robustness.effort import EFFORTS, EffortName
from carso_training.robustness.evaluation import Evaluation, Plan, images_of
from carso_training.robustness.figures import Figure
from carso_training.robustness.figures import read as read_figures
from carso_training.robustness.record import record as write_into_bundle
from carso_training.robustness.record import rewrite
from carso_training.robustness.report import update, updated
from carso_training.robustness.samples import samples_of
from carso_training.robustness.sanity import Checks
from carso_training.robustness.showcase import write_showcase
from carso_training.robustness.system import recipe_of
from carso_training.robustness.table import WIDTH, as_rich, wilson
from carso_training.robustness.typical import as_markdown as typical_as_markdown
from carso_training.robustness.typical import typical_of
from carso_training.robustness.voting import pipeline_of
from carso_training.run import Run, RunFolder, Split

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

INTERRUPTED = 130  # as a shell reports Ctrl-C
SANITY_IMAGES = 200  # the checks make their attacks a dozen times over
WantedProtocol = Literal["published", "certified", "strong", "adaptive", "sanity", "controls", "blackbox", "full"]
STRONG_EPS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40)  # cheap: the classifier of the first pass is small
ADAPTIVE_EPS = (0.15, 0.30)
SAMPLE_EPS = (0.10, 0.15, 0.20, 0.25, 0.30)

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
    subject: Annotated[
        str, typer.Argument(metavar="BUNDLE|RECIPE", help="A bundle's folder; or a recipe, whose run is finished.")
    ],
    *,
    protocol: Annotated[
        WantedProtocol,
        typer.Option(
            help="published: the attacks of the published table, which see a classifier only (needs a recipe). "
            "certified: what is proven of the classifier, on all images, at the strengths of `strong`. strong: "
            "the classifier alone, all attacks. adaptive: CARSO, by an attacker who knows all of it. sanity: checks "
            "that the attacks work. controls: simpler defences, and other numbers of votes. blackbox: a running "
            "service (--url), by its labels alone. full: all of these but certified and blackbox."
        ),
    ] = "published",
    split: Annotated[
        Split | None,
        typer.Option(help="Choose on `validation`; `test` is only ever measured. A recipe needs it; a bundle: test."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many of the split's images, drawn at random.")] = 1000,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001,
            max=1.0,
            help="Strengths; may be given several times. [default: 0.15 and 0.30; strong: 0.05, 0.10, ... 0.40]",
        ),
    ] = None,
    effort: Annotated[
        EffortName, typer.Option(help="quick: a tenth of the work, for a look. thorough: for a result.")
    ] = "thorough",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of APGD, in place of the effort's.")] = None,
    latents: Annotated[
        int | None, typer.Option(min=1, help="Latents per step of an attack, in place of the effort's.")
    ] = None,
    surrogate: Annotated[
        Path | None, typer.Option(help="Another bundle: images made against it are tried on this one too.")
    ] = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(help="Another bundle, whose classifier is one of the controls; may be given several times."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(envvar="CARSO_URL", help="Of a service that serves the bundle, for blackbox.")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Queries for each image, at most, for blackbox.")] = 1000,
    threads: Annotated[
        int,
        typer.Option(
            min=1,
            help="On the CPU. One is fastest beside other work; to use more cores, run a process for each eps.",
        ),
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the figures. [default: runs/robustness/<bundle>]")] = None,
    quick: Quick = False,
    seed: Seed = None,
    folder: Folder = None,
    source: DataFolder = None,
    accelerator: Accelerator = "auto",
) -> None:
    """Measure a bundle under attack. Nothing is trained.

    Except for the published table, each figure goes into a JSON file of its own, and you can stop at any time: run the
    same command again to resume. --seed decides the images and the attacks.
    """
    if (Path(subject) / MANIFEST).exists():
        if protocol == "published":
            raise RecipeError(
                f"{subject} is a bundle, and does not hold the undefended classifier of the published table. Give the "
                "recipe of its run, or another --protocol"
            )
        bundle, split = Bundle.load(Path(subject)), split or "test"
    elif split is None:
        raise typer.BadParameter("a recipe needs it: validation or test", param_hint="--split")
    else:
        chosen = _recipe(subject, quick=quick, seed=seed)
        opened = _open(chosen, folder, source=source, accelerator=accelerator, finished=True)
        system, bundle = opened.load()
        if protocol in ("published", "full"):
            for table in as_rich(opened.measure(system, bundle, split=split)):
                Console(width=WIDTH).print(table)
    if protocol == "certified":
        data, folder = images_of(bundle, split, given=source), out or Path("runs") / "robustness" / bundle.manifest.name
        for figure in certified(bundle, data=data, split=split, strengths=eps or STRONG_EPS, out=folder):
            _show(figure)
        typer.echo(folder)
    elif protocol != "published":
        torch.set_num_threads(threads)
        chosen_effort = EFFORTS[effort]
        budget = replace(chosen_effort, steps=steps or chosen_effort.steps, latents=latents or chosen_effort.latents)
        if budget != chosen_effort:
            budget = replace(budget, name="custom")
        evaluation = Evaluation(
            bundle,
            data=images_of(bundle, split, given=source),
            plan=Plan(split=split, images=images, seed=seed or 0, effort=budget),
            out=out or Path("runs") / "robustness" / bundle.manifest.name,
            device=_device(accelerator),
            threads=threads,
        )
        try:
            if protocol == "blackbox":
                if url is None:
                    raise typer.BadParameter("blackbox needs the URL of a running service", param_hint="--url")
                with Client(url, retries=0) as client:
                    service = Service(client, bundle)
                    evaluation.blackbox(eps or ADAPTIVE_EPS, service=service, queries=queries, report=_show)
                return
            _measure(
                evaluation,
                protocol,
                eps=eps,
                surrogate=None if surrogate is None else Bundle.load(surrogate),
                others=[Bundle.load(folder) for folder in control or ()],
                source=source,
            )
        except KeyboardInterrupt:
            _tell("stopped. Run the same command again to resume from the last finished batch")
            raise typer.Exit(INTERRUPTED) from None
        except Unavailable as e:
            raise RunError(f"{e}. Run the same command again to resume from the last finished image") from None


@app.command()
def typical(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    *,
    write: Annotated[
        bool,
        typer.Option("--write", help="Put thresholds and table into the bundle's manifest and model card."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
    source: DataFolder = None,
    accelerator: Accelerator = "auto",
) -> None:
    """Find out which images are typical of a bundle, and what that flags. Minutes on two cores.

    The thresholds are set on validation images, and the table is measured on test images. `run` does this too.
    """
    bundle = Bundle.load(folder)
    found = typical_of(
        bundle,
        validation=images_of(bundle, "validation", given=source),
        test=images_of(bundle, "test", given=source),
        seed=recipe_of(bundle).seed,
        device=_device(accelerator),
        given=source,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        durable.write(out, found.model_dump_json(indent=1) + "\n")
    if write:
        rewrite(bundle, typical=found)
    typer.echo(typical_as_markdown(found))


@app.command()
def disagreement(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    *,
    source: DataFolder = None,
) -> None:
    """Count the validation images on which the two paths disagree, and put that into the bundle's manifest.

    The service's alerts compare traffic with this rate. `run` does this too.
    """
    bundle = Bundle.load(folder)
    found = disagreement_of(
        bundle, validation=images_of(bundle, "validation", given=source), seed=recipe_of(bundle).seed
    )
    rewrite(bundle, disagreement=found)
    typer.echo(f"{folder}: the paths disagree on {found.disagree} of {found.images} validation images")


@app.command()
def duplicates(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    *,
    source: DataFolder = None,
) -> None:
    """Measure how near the codes of validation images come by chance, and put that into the bundle's manifest.

    The service calls what is nearer a near-duplicate (CARSO_DUPLICATES). `run` does this too.
    """
    bundle = Bundle.load(folder)
    found = near_duplicates_of(
        bundle, validation=images_of(bundle, "validation", given=source), seed=recipe_of(bundle).seed
    )
    rewrite(bundle, near_duplicates=found)
    typer.echo(
        f"{folder}: {found.share:.1%} of {found.images} validation images are within {found.distance:g} of one of the "
        f"{REMEMBERED} before them"
    )


@app.command()
def bounds(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    *,
    clean_rate: Annotated[
        bool,
        typer.Option(
            "--clean-rate",
            help="Also count the validation images that are proven, and put that into the manifest: the service's "
            "alert compares traffic with this rate. It needs the data set.",
        ),
    ] = False,
    eps: Annotated[
        float, typer.Option(min=LEAST_EPS, max=1.0, help="Of --clean-rate: CARSO_CERTIFY_EPS, as you will set it.")
    ] = DEFAULT_EPS,
    source: DataFolder = None,
) -> None:
    """Add to a bundle the graph by which the service proves labels. Its networks stay as they are. `run` does this too.

    A bundle whose labels cannot be proven is told so, and why.
    """
    bundle = Bundle.load(folder)
    answers = {
        name: array
        for name, array in dataclasses.asdict(bundle.self_test).items()
        if array is not None and name != "margins"
    }
    try:
        files = bounds_of(classifier_of(bundle), purifier_of(bundle), answers)
    except UnboundedLayerError as e:
        raise RunError(f"no label of {folder} can be proven: {e}") from None
    rewrite(bundle, files={**files, EARLIER_BOUNDS: None}, unbounded=None)
    typer.echo(folder / BOUNDS)
    if clean_rate:
        bundle = Bundle.load(folder)
        found = proofs_of(bundle, validation=images_of(bundle, "validation", given=source), eps=eps)
        rewrite(bundle, proofs=found)
        typer.echo(f"{folder}: {found.proven} of {found.images} validation images are proven at eps {eps:g}")


@app.command()
def report(
    page: Annotated[Path, typer.Argument(help="A page with marked places, such as docs/robustness.md.")],
    *,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; end with 1 if the page would change.")] = False,
) -> None:
    """Write the tables of a page again from the measured figures in the folder of the page's name, and plot them."""
    if check:
        if updated(page) != page.read_text():
            raise RunError(f"{page} is not what its figures say. Write it again with: carso-train report {page}")
    else:
        typer.echo(f"{page}: {'written again' if update(page) else 'as its figures say'}")
        if page.with_suffix("").is_dir():
            for path in plots.write(page.with_suffix("")):
                typer.echo(path)


@app.command()
def record(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    measured: Annotated[Path, typer.Argument(help="The folder of figures that `carso-train evaluate` wrote.")],
) -> None:
    """Write measured figures into a bundle: its table and its model card. Its networks stay as they are."""
    table = write_into_bundle(bundle, read_figures(measured)[0])
    typer.echo(f"{bundle}: {len(table)} figures, those under adaptive attack first")


@app.command()
def samples(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    *,
    images: Annotated[int, typer.Option(min=1, max=100, help="How many: the first of the split.")] = 10,
    eps: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=1.0, help=f"Strengths; may be given several times. [default: {SAMPLE_EPS}]"),
    ] = None,
    split: Annotated[Split, typer.Option(help="Of the images.")] = "test",
    effort: Annotated[EffortName, typer.Option(help="How hard the attacks try.")] = "quick",
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Decides attacks and votes.")] = 0,
    source: DataFolder = None,
) -> None:
    """Put the first images of a split into a bundle as its samples: clean, and attacked at several strengths.

    The attacks see the classifier alone (transfer), or all of CARSO (adaptive). Nothing is trained. A minute or two.
    """
    bundle = Bundle.load(folder)
    found = samples_of(
        bundle,
        data=images_of(bundle, split, given=source)[slice(images)],
        split=split,
        strengths=sorted(set(eps or SAMPLE_EPS)),
        effort=EFFORTS[effort],
        seed=seed,
    )
    rewrite(bundle, samples=found)
    typer.echo(f"{folder / SAMPLES}: {len(found) - 1} images, {sum(map(len, found.values())) / 1000:.0f} kB")


@app.command()
def showcase(
    recipe: RecipeName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")],
    count: Annotated[int, typer.Option(min=1, max=10)] = 3,
    quick: Quick = False,
    seed: Seed = None,
    folder: Folder = None,
    source: DataFolder = None,
) -> None:
    """Write test images of a finished run, clean and attacked, that show what CARSO is for. Nothing is trained."""
    opened = _open(_recipe(recipe, quick=quick, seed=seed), folder, source=source, accelerator="cpu", finished=True)
    system, bundle = opened.load()
    written = write_showcase(
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


def _show(figure: Figure) -> None:
    cell = figure.cell
    low, high = wilson(cell.correct, cell.images)
    typer.echo(
        f"{figure.protocol} {cell.defence} eps {cell.threat.eps:.2f}: {cell.correct} of {cell.images} images, "
        f"{cell.accuracy:.1f} % [{low:.1f}, {high:.1f}], in {figure.seconds:.0f} s"
    )
    for tried in figure.trials:
        if tried.answers:
            answers = ", ".join(f"{count} {name}" for name, count in sorted(tried.answers.items()))
            typer.echo(f"  {tried.attack}: {tried.attacked - tried.broken} of {cell.images} stand ({answers})")


def _measure(
    evaluation: Evaluation,
    protocol: WantedProtocol,
    *,
    eps: Sequence[float] | None,
    surrogate: Bundle | None,
    others: Sequence[Bundle],
    source: Path | None,
) -> None:
    strengths = eps or ADAPTIVE_EPS
    if protocol in ("strong", "full"):
        evaluation.strong(eps or STRONG_EPS, report=_show)
    if protocol in ("adaptive", "full"):
        evaluation.adaptive(strengths, surrogate=surrogate, report=_show)
        evaluation.strip(max(strengths), surrogate=surrogate)
    if protocol in ("controls", "full"):
        validation = (
            evaluation.data
            if evaluation.plan.split == "validation"
            else images_of(evaluation.bundle, "validation", given=source)
        )
        evaluation.controls(strengths, validation=validation, others=others, surrogate=surrogate, report=_show)
    if protocol in ("sanity", "full"):
        sanity = Checks(evaluation, images=min(SANITY_IMAGES, len(evaluation.rows)), eps=max(strengths)).run()
        for check in sanity.checks:
            typer.echo(f"{'pass' if check.passed else 'FAIL'}: {check.name} ({check.evidence})")
    typer.echo(evaluation.out)


def _device(accelerator: str) -> torch.device:
    """Choose where attacks are made."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailableError(
            f"--accelerator cuda: PyTorch {torch.__version__} finds no usable GPU. Check nvidia-smi and that this "
            "PyTorch was built for CUDA, or give --accelerator cpu"
        )
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


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
    except (TrainingError, BundleError, CarsoError, DeviceError, InstallationError, MisconfigurationException) as e:
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
