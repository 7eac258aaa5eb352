"""Where one run of the vote graph spends its time, operator by operator, by ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime as ort
from carso.bundle import Bundle

WARM_UP = 3  # runs that are not counted


def profile(bundle: Bundle, *, rows: int, runs: int, threads: int) -> dict[str, float]:
    """Median milliseconds of each node of the optimised graph, named `operator node`, and `between operators`."""
    latents = np.random.default_rng(0).standard_normal((rows, bundle.manifest.latent), dtype=np.float32)
    feeds = {"codes": bundle.self_test.codes[:1], "code_index": np.zeros(rows, np.int64), "latents": latents}
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "vote")
        session = ort.InferenceSession(bundle.vote, options, providers=["CPUExecutionProvider"])
        for _ in range(WARM_UP + runs):
            session.run(["votes"], feeds)
        events = json.loads(Path(session.end_profiling()).read_text())

    nodes: dict[str, list[float]] = defaultdict(list)
    whole: list[float] = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            nodes[f"{event['args']['op_name']} {name}"].append(event["dur"] / 1e3)
        elif event["name"] == "SequentialExecutor::Execute":
            whole.append(event["dur"] / 1e3)
    spent = {name: float(np.median(durations[WARM_UP:])) for name, durations in nodes.items()}
    spent["between operators"] = max(0.0, float(np.median(whole[WARM_UP:])) - sum(spent.values()))
    return dict(sorted(spent.items(), key=lambda entry: -entry[1]))
