"""The parts of the command `carso` that ask a running service. The API key, if one is needed, is CARSO_API_KEY.

Only what Typer needs is imported here: each command imports the client when it runs.
"""

from __future__ import annotations

import glob
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from carso.choices import Certifying, Fit
from carso.client import DEFAULT_URL

if TYPE_CHECKING:
    from carso import FastResult, Images, Info, RobustResult, StreamAnswer
    from carso.client.tables import Prediction

FAILED = 1
STANDARD_INPUT = Path("-")
OF_THE_CALLER = (401, 403, 404)  # statuses that every file would get: a bad key, a seed, another server's URL
RANDOM_BATCHES = 256  # that `bench` sends in turn: enough not to measure a few images, and made before the clock starts


def _checked_url(url: str) -> str:
    from carso.client.clients import checked_url

    try:
        return checked_url(url)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


Url = Annotated[str, typer.Option("--url", envvar="CARSO_URL", callback=_checked_url, help="URL of the service.")]
Fast = Annotated[bool, typer.Option("--fast", help="Take the fast path: the classifier alone.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Votes to count per image, at most.")]
Risk = Annotated[
    float | None,
    typer.Option(min=0, max=0.5, help="Chance that early stopping changes the outcome; 0: count until it is certain."),
]
Resize = Annotated[bool, typer.Option("--resize", help="Scale encoded images of another size.")]
Fitting = Annotated[Fit, typer.Option(help="With --resize: keep proportions and pad, or stretch to the bundle's.")]
Invert = Annotated[bool, typer.Option("--invert", help="Invert the values, as for dark ink on white.")]
Background = Annotated[
    str | None, typer.Option(help="What transparent pixels show: white, black or a colour as RRGGBB.")
]
Certify = Annotated[
    Certifying | None,
    typer.Option(
        help="What to prove: that all images within an eps get the same label from the first pass. report: at "
        "--certify-eps. max: at the largest eps. decide: a proven label needs no vote."
    ),
]
CertifyEps = Annotated[float | None, typer.Option(help="The eps of --certify.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def classify(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Images, or .npy files of many; - is standard input."),
    ],
    *,
    fast: Fast = False,
    samples: Samples = None,
    risk: Risk = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**53 - 1, help="Seed of the latents.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds for each file, retries included.")] = None,
    resize: Resize = False,
    fit: Fitting = "pad",
    invert: Invert = False,
    background: Background = None,
    explain: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write a picture of each image's vote into this folder, and show it if possible."
        ),
    ] = None,
    certify: Certify = None,
    certify_eps: CertifyEps = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Classify images; with --json, a line for each.

    If a file cannot be read or is refused, the others are still classified.
    """
    if fast and (samples, risk, seed, explain) != (None, None, None, None):
        raise typer.BadParameter(
            "--samples, --risk, --seed and --explain are for the robust path: leave out these, or --fast"
        )
    if explain is not None:
        _check_pictures(explain)
    from carso import CarsoError, Client, DeadlineExceeded, RequestRefused
    from carso.client import tables

    rows: list[tuple[str, Prediction]] = []
    failed = False

    def ask(client: Client, image: Path | bytes) -> RobustResult | FastResult:
        if fast:
            return client.classify_fast(
                image,
                resize=resize,
                fit=fit,
                invert=invert,
                background=background,
                certify=certify,
                certify_eps=certify_eps,
                deadline=deadline,
            )
        return client.classify(
            image,
            samples=samples,
            risk=risk,
            seed=seed,
            resize=resize,
            fit=fit,
            invert=invert,
            background=background,
            explain=explain is not None,
            certify=certify,
            certify_eps=certify_eps,
            deadline=deadline,
        )

    with _reported(), Client(url) as client:
        for file in files:
            try:
                result = ask(client, sys.stdin.buffer.read() if file == STANDARD_INPUT else file)
            except OSError as e:
                _complain(f"{file}: {e.strerror or e}")
                failed = True
                continue
            except CarsoError as e:
                _complain(f"{file}: {e}")
                failed = True
                if isinstance(e, (RequestRefused, DeadlineExceeded)) and e.status not in OF_THE_CALLER:
                    continue
                break  # the other files would fail too
            predictions: Sequence[Prediction] = result.predictions
            for index, prediction in enumerate(predictions):
                name = f"{file}[{index}]" if len(predictions) > 1 else str(file)
                if as_json:
                    tables.print_json({"file": name, **tables.sent(prediction), "request_id": result.request_id})
                rows.append((name, prediction))
                if explain is not None:
                    _draw(explain, len(rows), file, prediction, show=not as_json)
    if rows and not as_json:
        heads = tables.FAST_HEADS if fast else tables.ROBUST_HEADS
        lines = [tables.row(*row) for row in rows]
        if any("certified" in prediction.model_fields_set for _, prediction in rows):
            heads = (*heads, tables.PROVEN)
            lines = [(*line, tables.proven(prediction)) for line, (_, prediction) in zip(lines, rows, strict=True)]
        tables.print_table(heads, lines)
    for row in rows:
        for warning in tables.warnings(*row):
            _complain(warning)
    if failed:
        raise typer.Exit(FAILED)


def _check_pictures(folder: Path) -> None:
    """Make the folder of the pictures. Ends with exit status 2 if that, or drawing, is not possible."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise typer.BadParameter("--explain draws with Pillow, which is not installed: pip install pillow") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise typer.BadParameter(f"--explain: {folder} cannot be a folder of pictures: {e.strerror}") from None


def _draw(folder: Path, number: int, file: Path, prediction: Prediction, *, show: bool) -> None:
    """Write the picture of a prediction, and show it if a terminal can."""
    from carso import RobustPrediction
    from carso.client.drawing import picture
    from carso.client.terminals import shown

    assert isinstance(prediction, RobustPrediction)  # noqa: S101  --fast and --explain do not go together
    png = picture(prediction)
    path = folder / f"{number:04d}-{'stdin' if file == STANDARD_INPUT else file.stem}.png"
    path.write_bytes(png)
    if show and sys.stdout.isatty() and (text := shown(png, os.environ)):
        typer.echo(text, nl=False)


def info(*, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Show what is served, with which limits, on which device."""
    from carso import Client
    from carso.client import tables

    with _reported(), Client(url) as client:
        answer = client.info()
    if as_json:
        tables.print_json(tables.sent(answer))
    else:
        tables.print_table(("", ""), tables.facts(answer))


def _files(patterns: list[str] | None) -> list[Path]:
    """Find the files that are meant: a file, those of a folder, or those that match a pattern."""
    found: list[Path] = []
    for pattern in patterns or ():
        path = Path(pattern)
        files = sorted(path.iterdir()) if path.is_dir() else [path, *map(Path, sorted(glob.glob(pattern)))]  # noqa: PTH207
        files = [file for file in files if file.is_file()]
        if not files:
            raise typer.BadParameter(f"{pattern!r} is not a file, a folder with files, or a pattern that finds files")
        found += dict.fromkeys(files)
    return found


PATTERN = "a file, a folder, or a pattern such as 'digits/*.png'; may be given several times"


def bench(
    url: Annotated[
        str, typer.Argument(metavar="URL", envvar="CARSO_URL", callback=_checked_url, help="URL of the service.")
    ],
    *,
    connections: Annotated[int, typer.Option(min=1, max=1000, help="Requests in flight at any time.")] = 32,
    seconds: Annotated[float, typer.Option(min=0, max=86400, help="How long; 0: until it is interrupted.")] = 10,
    fast: Fast = False,
    both: Annotated[bool, typer.Option("--both", help="Send every second request to the fast path.")] = False,
    samples: Samples = None,
    risk: Risk = None,
    image: Annotated[
        list[str] | None, typer.Option(help=f"Images to send in turn instead of random ones: {PATTERN}.")
    ] = None,
    attacked: Annotated[
        list[str] | None,
        typer.Option(
            help="Images for a third of the robust requests in the first third of each period; given as for --image."
        ),
    ] = None,
    period: Annotated[float, typer.Option(min=1, help="Seconds from one attack to the next.")] = 180,
    pause: Annotated[float, typer.Option(min=0, help="Seconds between two requests of a connection, on average.")] = 0,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images of each request.")] = 1,
    as_json: Json = False,
) -> None:
    """Load a service, and show how fast it answers.

    Each connection sends its next request when its last one is answered. No request is sent twice.

    Most random images take more votes than real ones. This command takes processor time too: run it on another machine.
    """
    if fast and (samples, risk, attacked, both) != (None, None, None, False):
        raise typer.BadParameter(
            "--samples, --risk, --attacked and --both are for the robust path: leave out these, or --fast"
        )
    import asyncio

    from carso import AsyncClient
    from carso.client import tables
    from carso.client.load import Measured, Traffic, drive

    usual, disturbing = _files(image), _files(attacked)
    measured = Measured()

    async def run() -> None:
        async with AsyncClient(url, retries=0, connections=connections) as client:
            answer = await client.info()
            traffic = Traffic(
                usual=_of_files(usual, batch) if usual else _random(answer, batch),
                attacked=_of_files(disturbing, batch),
                period=period,
            )

            async def send(number: int) -> RobustResult | FastResult:
                robust = not (fast or (both and number % 2))
                images = traffic.images(number, robust=robust, now=time.time())
                if robust:
                    return await client.classify(images, samples=samples, risk=risk)
                return await client.classify_fast(images)

            await drive(
                send,
                measured,
                connections=connections,
                seconds=seconds or math.inf,
                pause=pause,
                complain=_complain,
            )

    with _reported(), suppress(KeyboardInterrupt):  # what was measured until then is shown
        asyncio.run(run())
    summary = measured.summary()
    if as_json:
        tables.print_json(summary)
    else:
        tables.print_table(("", ""), [(name, tables.flat(value)) for name, value in summary.items()])
    if not measured.latencies:
        raise typer.Exit(FAILED)


def watch(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder, or a list of files; - is one on standard input."),
    ],
    *,
    rate: Annotated[float | None, typer.Option(min=0, max=1, help="Chance that a frame is voted on.")] = None,
    max_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="What that chance rises to while the service is idle.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(min=0, max=1, help="Vote on frames whose two best classes differ by less.")
    ] = None,
    untypical: Annotated[bool, typer.Option("--untypical", help="Vote on frames unlike the bundle's.")] = False,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="Vote on frames that are not proven; with --certify.")
    ] = False,
    budget: Annotated[float | None, typer.Option(min=1, help="Votes per second, at most.")] = None,
    samples: Samples = None,
    risk: Risk = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds for each vote.")] = None,
    resize: Resize = False,
    fit: Fitting = "pad",
    invert: Invert = False,
    background: Background = None,
    certify: Certify = None,
    certify_eps: CertifyEps = None,
    every: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks at a folder.")] = 0.5,
    output: Annotated[Path | None, typer.Option(help="Append the lines to this file instead of printing them.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Send images over a stream as they appear, and print a line of JSON for each answer.

    A folder is watched until Ctrl-C; a list ends. Every image gets the fast answer, and those that the policy chooses
    the robust one too. A file that cannot be read or is refused does not stop the others. If the connection breaks, it
    is made again, and no image that was read is lost; some may be answered twice.
    """
    import asyncio
    import json

    from carso import AsyncClient, FrameError
    from carso.client.watching import Watch, files_of

    if source != str(STANDARD_INPUT) and not Path(source).exists():
        raise typer.BadParameter(f"{source!r} is neither a folder nor a file that lists images, nor -")
    failed = False

    async def run(lines: TextIO) -> None:
        def tell(file: Path, answer: StreamAnswer | OSError) -> None:
            nonlocal failed
            if isinstance(answer, OSError):
                content = {"error": "unreadable_file", "message": answer.strerror or str(answer)}
            else:
                content = answer.model_dump(mode="json", exclude_unset=True, exclude={"id", "line"})
            failed |= isinstance(answer, OSError | FrameError)
            lines.write(json.dumps({"file": str(file), **content}) + "\n")
            lines.flush()

        async with AsyncClient(url) as client:
            await Watch(
                client,
                files_of(source, every=every),
                tell=tell,
                complain=_complain,
                rate=rate,
                max_rate=max_rate,
                margin=margin,
                untypical=untypical,
                uncertified=uncertified,
                budget=budget,
                samples=samples,
                risk=risk,
                deadline=deadline,
                resize=resize,
                fit=fit,
                invert=invert,
                background=background,
                certify=certify,
                certify_eps=certify_eps,
            ).run()

    with (
        _reported(),
        suppress(KeyboardInterrupt),
        nullcontext(sys.stdout) if output is None else output.open("a", encoding="utf-8") as lines,
    ):
        try:
            asyncio.run(run(lines))
        except ExceptionGroup as e:  # of what ran side by side, one has failed
            raise e.exceptions[0] from None
    if failed:
        raise typer.Exit(FAILED)


def _of_files(files: list[Path], size: int) -> list[Images]:
    contents = [file.read_bytes() for file in files]
    return [[contents[(start + i) % len(contents)] for i in range(size)] for start in range(len(contents))]


def _random(answer: Info, size: int) -> list[Images]:
    from carso.client.load import random_npy

    shape = (size, *answer.bundle.input.shape)
    return [random_npy(shape, seed=seed) for seed in range(max(1, RANDOM_BATCHES // size))]


@contextmanager
def _reported() -> Iterator[None]:
    """Turn the error of a call into one line on standard error and exit status 1."""
    from carso import CarsoError

    try:
        yield
    except (CarsoError, OSError, ValueError) as e:  # ValueError: an API key that cannot be one
        _complain(str(e))
        raise typer.Exit(FAILED) from None


def _complain(message: str) -> None:
    typer.echo(f"carso: {message}", err=True)
