"""From a bundle and the settings to a pipeline. Where workers share an engine, only its process imports this."""

from __future__ import annotations

from functools import partial

from carso.bundle import Bundle
from carso.choices import CHECKED, CUDA
from carso.inference.latents import DRAWERS
from carso.inference.one_thread import OneThread
from carso.inference.pipeline import Pipeline
from carso.inference.processors import usable_cpus
from carso.inference.sessions import Sessions
from carso.settings import Settings


def pipeline_of(bundle: Bundle, settings: Settings) -> tuple[Pipeline, OneThread]:
    """Load the graphs of a bundle, and self-test them, in the thread that has to run them. Raises DeviceError."""
    manifest = bundle.manifest
    thread = OneThread()
    sessions = thread.submit(
        partial(
            Sessions,
            bundle,
            device=settings.device,
            precision=settings.precision,
            threads=settings.threads,
            spin=settings.spin,
            cuda_graphs=settings.cuda_graphs,
        )
    ).result()
    pipeline = Pipeline(
        sessions,
        latent=manifest.latent,
        classes=len(manifest.classes),
        round_rows=settings.round_rows,
        eps=None if manifest.typical is None else manifest.typical.eps,
        typical_on=CHECKED[settings.typical],
        draw_threads=min(DRAWERS, usable_cpus()) if sessions.provider == CUDA else 1,
    )
    return pipeline, thread
