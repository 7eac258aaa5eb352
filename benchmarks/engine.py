"""One full count, from image to tally, against PyTorch and the machine's own ceiling: python -m benchmarks.engine

Every way casts all votes of one image on the same number of threads. The ceiling is the fastest library's time for the
matrix products of these votes alone: no activations, no random numbers, no first pass, outputs allocated beforehand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import torch
import typer
from carso.bundle import Bundle
from carso.inference.sessions import Sessions, usable_cpus
from carso.inference.vote import LARGEST_BALLOT
from carso.settings import Settings
from threadpoolctl import threadpool_limits

from benchmarks import ceiling
from benchmarks.full_count import ServiceWays, TorchWays
from benchmarks.operators import profile
from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, table
from benchmarks.timing import Way, interleaved, ratios, spread

BALLOTS, RISK_BALLOTS, ONE_BATCH = "service, exact ballots", "service, risk 1e-3 ballots", "service, one batch"
LOOP, BATCH, FOLDED = "PyTorch, a loop", "PyTorch, one batch", "PyTorch, one folded batch"
PRODUCTS = {"numpy": "products, numpy", "torch": "products, PyTorch", "onnxruntime": "products, ONNX Runtime"}
LATENTS = "latents alone"


def ways(bundle: Bundle, *, threads: int) -> dict[str, Way]:
    image = bundle.self_test.images[:1]
    samples, latent = bundle.manifest.samples, bundle.manifest.latent
    sessions = Sessions(bundle, device="cpu", threads=threads)
    service = ServiceWays(bundle, sessions, image, round_rows=Settings.model_fields["round_rows"].default)
    pytorch = TorchWays(bundle, image)
    if (agreement := pytorch.agreement(bundle)) < 0.98:
        raise SystemExit(f"the bundle's weights cast only {agreement:.1%} of its known votes: export it anew")
    found = ceiling.shapes(bundle)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    draws = np.random.Generator(np.random.Philox(key=0))
    return {
        BALLOTS: lambda: service.in_ballots(risk=0.0),
        RISK_BALLOTS: lambda: service.in_ballots(risk=1e-3),
        ONE_BATCH: service.in_one_batch,
        LOOP: pytorch.in_a_loop,
        BATCH: pytorch.in_one_batch,
        FOLDED: pytorch.folded_in_one_batch,
        PRODUCTS["numpy"]: ceiling.with_numpy(found, rows=samples),
        PRODUCTS["torch"]: ceiling.with_torch(found, rows=samples),
        PRODUCTS["onnxruntime"]: ceiling.with_onnxruntime(found, rows=samples, options=options),
        LATENTS: lambda: draws.standard_normal((samples, latent), dtype=np.float32),
    }


def show(seconds: Mapping[str, Sequence[float]], *, flop: int) -> str:
    """Print the table; return the name of the ceiling."""
    best = min(PRODUCTS.values(), key=lambda name: float(np.median(seconds[name])))
    shown = table(
        f"one full count ({flop / 1e9:.1f} GFLOP of products); ceiling: {best}; medians, with quartiles",
        *("way", "ms", "share of the ceiling, %", "times as fast as a loop", "one batch", "one folded batch"),
    )
    for name, took in seconds.items():
        cells = [
            spread(100 / ratios(seconds, name, best), digits=1),
            *(f"{np.median(1 / ratios(seconds, name, other)):.2f}" for other in (LOOP, BATCH, FOLDED)),
        ]
        shown.add_row(name, spread(1e3 * np.array(took)), *([] if name == LATENTS else cells))
    console.print(shown)
    return best


def show_operators(bundle: Bundle, *, threads: int, runs: int) -> dict[str, dict[str, float]]:
    """Profiles at a full count's and at the largest ballot's size."""
    profiles = {
        str(rows): profile(bundle, rows=rows, runs=runs, threads=threads)
        for rows in (bundle.manifest.samples, LARGEST_BALLOT)
    }
    for rows, spent in profiles.items():
        shown = table(f"one run of the vote graph on {rows} votes", "operator", "ms", "share, %")
        for name, milliseconds in spent.items():
            shown.add_row(name, f"{milliseconds:.3f}", f"{100 * milliseconds / sum(spent.values()):.1f}")
        console.print(shown)
    return profiles


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    repetitions: Annotated[int, typer.Option(min=1)] = 25,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every way. [default: the processors]")] = None,
    json: JsonFile = None,
) -> None:
    logging.getLogger("service").setLevel(logging.WARNING)
    loaded = Bundle.load(bundle)
    known = begin("engine", loaded)
    threads = threads or usable_cpus()
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        seconds = interleaved(ways(loaded, threads=threads), repetitions=repetitions)
    best = show(seconds, flop=ceiling.flop(ceiling.shapes(loaded), rows=loaded.manifest.samples))
    results: dict[str, Any] = {
        "seconds": seconds,
        "ceiling": best,
        "operators": show_operators(loaded, threads=threads, runs=repetitions),
    }
    keep(json, known=known, options={"repetitions": repetitions, "threads": threads}, results=results)


if __name__ == "__main__":
    typer.run(main)
