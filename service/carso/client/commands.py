"""The command `carso`: ask a running CARSO service. The API key, where one is needed, is read from CARSO_API_KEY."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from carso.client import (
    AsyncClient,
    CarsoError,
    Client,
    FastPrediction,
    FastResult,
    Images,
    Info,
    RequestRefused,
    RobustPrediction,
    RobustResult,
)
from carso.client.clients import DEFAULT_URL, checked_url

Prediction: TypeAlias = RobustPrediction | FastPrediction

FAILED = 1
RANDOM_BATCHES = 256  # that `bench` sends in turn: enough to be no one image's speed, and made before the clock starts

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def _checked_url(url: str) -> str:
    try:
        return checked_url(url)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


Url = Annotated[str, typer.Option("--url", envvar="CARSO_URL", callback=_checked_url, help="Of the service.")]
Fast = Annotated[bool, typer.Option("--fast", help="The fast path: the classifier alone.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Votes to count per image, at most.")]
Risk = Annotated[float | None, typer.Option(min=0, max=0.5, help="Of stopping the count early; 0: none.")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@app.command()
def classify(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", exists=True, dir_okay=False, readable=True, help="Images, or .npy files of many."
        ),
    ],
    *,
    fast: Fast = False,
    samples: Samples = None,
    risk: Risk = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**53 - 1, help="Of the latents.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds for each file, retries included.")] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Scale images of another size.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Classify images; with --json, a line for each.

    A file that is refused does not keep the others from being classified.
    """
    if fast and (samples, risk, seed) != (None, None, None):
        raise typer.BadParameter("--samples, --risk and --seed are of the robust path: leave them out, or --fast")
    rows: list[tuple[str, Prediction]] = []
    failed = False
    with _reported(), Client(url) as client:
        for file in files:
            result: RobustResult | FastResult
            try:
                if fast:
                    result = client.classify_fast(file, resize=resize, deadline=deadline)
                else:
                    result = client.classify(
                        file, samples=samples, risk=risk, seed=seed, resize=resize, deadline=deadline
                    )
            except (CarsoError, OSError) as e:
                _complain(f"{file}: {e}")
                failed = True
                if isinstance(e, (RequestRefused, OSError)):
                    continue
                break  # the other files would fare no better
            predictions: Sequence[Prediction] = result.predictions
            for index, prediction in enumerate(predictions):
                name = f"{file}[{index}]" if len(predictions) > 1 else str(file)
                if as_json:
                    _print_json({"file": name, **_sent(prediction), "request_id": result.request_id})
                rows.append((name, prediction))
    if rows and not as_json:
        heads = ("file", "class", "probability") if fast else ("file", "class", "share", "votes", "fast label", "agree")
        _print_table(heads, [_row(*row) for row in rows])
    for name, prediction in rows:
        if isinstance(prediction, RobustPrediction):
            _warn(name, prediction)
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def info(*, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Show what is served, with which limits, on what."""
    with _reported(), Client(url) as client:
        answer = client.info()
    if as_json:
        _print_json(_sent(answer))
    else:
        _print_table(("", ""), _facts(answer))


@app.command()
def bench(
    url: Annotated[
        str, typer.Argument(metavar="URL", envvar="CARSO_URL", callback=_checked_url, help="Of the service.")
    ],
    *,
    connections: Annotated[int, typer.Option(min=1, max=1000, help="Requests in flight at any time.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.1, max=86400)] = 10,
    fast: Fast = False,
    samples: Samples = None,
    risk: Risk = None,
    image: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="To send instead of random images."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images of each request.")] = 1,
    as_json: Json = False,
) -> None:
    """Load a service, and show how fast it answers.

    Every connection sends its next request when the last one is answered; none is sent twice.

    Random images take more votes than real ones mostly do. This command takes processor time too: run it elsewhere.
    """
    if fast and (samples, risk) != (None, None):
        raise typer.BadParameter("--samples and --risk are of the robust path: leave them out, or --fast")
    from carso.client.load import Measured, drive  # numpy takes its time to import, and other commands do without

    async def run() -> Measured:
        async with AsyncClient(url, retries=0, connections=connections) as client:
            batches = _batches(await client.info(), image, batch)

            async def send(number: int) -> RobustResult | FastResult:
                images = batches[number % len(batches)]
                if fast:
                    return await client.classify_fast(images)
                return await client.classify(images, samples=samples, risk=risk)

            return await drive(send, connections=connections, seconds=seconds)

    with _reported():
        measured = asyncio.run(run())
    summary = measured.summary()
    if as_json:
        _print_json(summary)
    else:
        _print_table(("", ""), [(name, _flat(value)) for name, value in summary.items()])
    if measured.first_error:
        _complain(f"the first error: {measured.first_error}")
    if not measured.latencies:
        raise typer.Exit(FAILED)


def main() -> None:
    """Exits with 0, 1 for a request that was refused or failed, 2 for wrong usage."""
    app(prog_name="carso")


@contextmanager
def _reported() -> Iterator[None]:
    """Errors of a call as one line on standard error and exit code 1."""
    try:
        yield
    except (CarsoError, OSError, ValueError) as e:  # ValueError: of an API key that is none
        _complain(str(e))
        raise typer.Exit(FAILED) from None


def _complain(message: str) -> None:
    typer.echo(f"carso: {message}", err=True)


def _warn(name: str, prediction: RobustPrediction) -> None:
    if prediction.agree is False:
        _complain(
            f"warning: {name}: the vote says label {prediction.label}, the fast path {prediction.fast_label}: "
            "somebody may be at work"
        )
    if not prediction.complete:
        votes = "" if prediction.votes is None else f" after {prediction.votes} of {prediction.samples} votes"
        _complain(f"warning: {name}: the deadline ended the count{votes}")


def _row(name: str, prediction: Prediction) -> Sequence[str]:
    """Of the table; "-" for what the service withholds."""
    shown: tuple[object, ...]
    match prediction:
        case RobustPrediction(share=share, agree=agree):
            shown = (
                None if share is None else f"{share:.4f}",
                prediction.votes,
                prediction.fast_label,
                {True: "yes", False: "NO", None: None}[agree],
            )
        case FastPrediction(probabilities=probabilities):
            shown = (None if probabilities is None else f"{probabilities[prediction.label]:.4f}",)
    return (name, prediction.class_name, *("-" if value is None else str(value) for value in shown))


def _facts(answer: Info) -> list[Sequence[str]]:
    bundle, limits = answer.bundle, answer.limits
    return [
        ("service", answer.version),
        ("bundle", f"{bundle.name} {bundle.version}, {bundle.checksum[:12]}"),
        ("classes", f"{len(bundle.classes)}: {', '.join(bundle.classes)}"),
        ("input", f"{list(bundle.input.shape)} in [{bundle.input.low:g}, {bundle.input.high:g}]"),
        ("votes", f"{bundle.samples} at risk {answer.risk:g}, at most {limits.max_samples}"),
        ("device", f"{answer.device.provider}, {answer.device.precision}"),
        ("per request", f"{limits.max_images} images, {limits.max_body_bytes} bytes, {limits.max_pixels} pixels"),
        ("seeds", "taken" if limits.allow_seed else "refused"),
    ]


def _batches(answer: Info, image: Path | None, size: int) -> list[Images]:
    if image is not None:
        return [[image.read_bytes()] * size]
    import numpy as np

    draws = np.random.default_rng(0)
    shape = (size, *answer.bundle.input.shape)
    return [draws.integers(0, 256, shape, np.uint8) for _ in range(max(1, RANDOM_BATCHES // size))]


def _flat(value: object) -> str:
    """A number, or some by name, on a line."""
    return ", ".join(f"{name}: {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def _sent(value: Prediction | Info) -> dict[str, Any]:
    """What the service sent of it, and no more."""
    return value.model_dump(mode="json", exclude_unset=True)


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content))


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """By rich on a terminal; elsewhere in plain columns, two spaces apart, whatever their width."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*heads, box=None, show_header=any(heads), pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell, style="bold red" if cell == "NO" else "", overflow="fold") for cell in row))
        Console().print(table)
        return
    lines = [heads, *rows] if any(heads) else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
