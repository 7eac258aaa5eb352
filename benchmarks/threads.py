"""ONNX Runtime's threads and spinning: python -m benchmarks.threads

One run of the vote graph at a round's usual sizes and a first pass, for every number of threads, with idle threads
sleeping or spinning. Each run comes after a pause of one millisecond, as between the requests of a service. Processor
time over wall time says what spinning costs everything else on the machine.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer
from carso.bundle import Bundle
from carso.inference.sessions import Sessions, usable_cpus
from rich.progress import track

from benchmarks.report import REFERENCE, BundleFolder, JsonFile, begin, console, keep, progress_console, table

ROWS = (0, 12, 64, 256, 512)  # 0: a first pass of one image; 12: an undisputed image's votes at risk 1e-3
PAUSE = 1e-3  # seconds
RUNS = 30  # per repetition


@dataclass(frozen=True)
class Measured:
    threads: int
    spin: bool
    rows: int
    milliseconds: float  # median over runs
    processors: float  # busy, on average, pauses included


def measure(sessions: Sessions, bundle: Bundle, *, threads: int, spin: bool, rows: int) -> Measured:
    test = bundle.self_test
    latents = np.random.default_rng(0).standard_normal((rows, bundle.manifest.latent), dtype=np.float32)
    feeds = test.codes[:1], np.zeros(rows, np.int64), latents
    took = []
    began, busy = time.perf_counter(), time.process_time()
    for _ in range(RUNS):
        time.sleep(PAUSE)
        start = time.perf_counter()
        if rows:
            sessions.vote(*feeds)
        else:
            sessions.first_pass(test.images[:1])
        took.append(time.perf_counter() - start)
    busy, began = time.process_time() - busy, time.perf_counter() - began
    return Measured(threads, spin, rows, 1e3 * float(np.median(took)), busy / began)


def main(
    *,
    bundle: BundleFolder = REFERENCE,
    repetitions: Annotated[int, typer.Option(min=1, help="Of the whole sweep.")] = 7,
    json: JsonFile = None,
) -> None:
    loaded = Bundle.load(bundle)
    known = begin("threads", loaded)
    sweep = [(threads, spin) for threads in range(1, usable_cpus() + 1) for spin in (False, True)]
    found: list[Measured] = []
    for _ in track(range(repetitions), description="repetitions", console=progress_console, transient=True):
        for threads, spin in sweep:
            sessions = Sessions(loaded, device="cpu", threads=threads, spin=spin)
            found += [measure(sessions, loaded, threads=threads, spin=spin, rows=rows) for rows in ROWS]
            del sessions  # its threads would spin on beside the next one's
    shown = table(
        "milliseconds (and processors busy), median over repetitions",
        *("threads", "idle ones", "first pass", *(f"{rows} votes" for rows in ROWS[1:])),
    )
    for threads, spin in sweep:
        cells = []
        for rows in ROWS:
            same = [m for m in found if (m.threads, m.spin, m.rows) == (threads, spin, rows)]
            took, busy = np.median([(m.milliseconds, m.processors) for m in same], axis=0)
            cells.append(f"{took:.2f} ({busy:.2f})")
        shown.add_row(str(threads), "spin" if spin else "sleep", *cells)
    console.print(shown)
    keep(json, known=known, options={"repetitions": repetitions}, results={"measured": [asdict(m) for m in found]})


if __name__ == "__main__":
    typer.run(main)
