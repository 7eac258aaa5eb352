"""CARSO's answers, from the service's own pipeline on a bundle's ONNX graphs, in a way that can be reproduced."""

from __future__ import annotations

import numpy as np
from carso.bundle import Bundle
from carso.choices import MAX_SEED, Precision
from carso.inference.jobs import Job, Result, VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import Sessions

ROUND_ROWS = 512  # benchmarks/threads.py: larger rounds cost more per vote on a CPU


def pipeline_of(
    bundle: Bundle, *, threads: int | None = None, precision: Precision = "float32", eps: float | None = None
) -> Pipeline:
    """Build a bundle's pipeline, on CUDA if it is there. Raises DeviceError if its graphs do not run.

    In int8 it is always on the CPU: that form of the votes is for CPUs. `threads` is how many threads votes use there;
    None: one for each processor that this process may use. `eps`: as of Pipeline.
    """
    return Pipeline(
        Sessions(bundle, device="cpu" if precision == "int8" else "auto", precision=precision, threads=threads),
        latent=bundle.manifest.latent,
        classes=len(bundle.manifest.classes),
        round_rows=ROUND_ROWS,
        eps=eps,
    )


def robust_results(
    pipeline: Pipeline, images: np.ndarray, *, samples: int, risk: float, seeds: np.ndarray
) -> list[Result]:
    """Return the result of each image, on the robust path.

    `images` [n, *shape] float32 in the bundle's value range. `samples`: votes asked for; a count ends early at `risk`.
    `seeds` [n]: each image has latents of its own, as in the service without a seed; with one seed for all, one
    unlucky draw of latents would tell in every image. The pipeline must be idle.
    """
    return pipeline.run(
        Job(image[None], VotePlan(samples=samples, risk=risk, seed=seed))
        for image, seed in zip(images, seeds.tolist(), strict=True)
    )


def robust_answers(
    pipeline: Pipeline, images: np.ndarray, *, samples: int, risk: float, seeds: np.ndarray
) -> np.ndarray:
    """Return the class that CARSO's vote elects for each image: [n] int64. Arguments are those of `robust_results`."""
    results = robust_results(pipeline, images, samples=samples, risk=risk, seeds=seeds)
    return np.array([result.outcomes[0].label for result in results], np.int64)


def vote_seeds(count: int, *, seed: int, part: int) -> np.ndarray:
    """Derive `count` seeds [count] int64 for votes from one seed; another `part` gives others."""
    state = np.random.SeedSequence((seed, part)).generate_state(count, np.uint64)
    return (state % (MAX_SEED + 1)).astype(np.int64)
