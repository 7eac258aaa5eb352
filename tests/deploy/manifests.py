"""The Kubernetes manifests, rendered."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())
OPTIONS = (
    ("api-keys", "bundle"),
    ("api-keys", "bundle-volume", "bundle-signature", "grpc", "tracing"),
)  # components that no overlay has

KSERVE_FIELDS = {"minReplicas"}  # of a predictor, beside those of a pod

Object = dict[str, Any]


@cache
def rendered(overlay: str) -> str:
    """What `kubectl apply -k` would apply. Raises RuntimeError."""
    return kustomized(ROOT / "k8s/overlays" / overlay)


def rendered_with(overlay: str, components: tuple[str, ...], folder: Path) -> str:
    """An overlay of somebody's own in `folder`: that one and some components."""
    folder.mkdir(parents=True)
    k8s = Path(os.path.relpath(ROOT / "k8s", folder.resolve()))
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(k8s / "overlays" / overlay)],
        "components": [str(k8s / "components" / name) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return kustomized(folder)


def objects(content: str) -> list[Object]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    return [found for found in yaml.load_all(content, loader) if found]


def pod_specs(found: list[Object]) -> Iterator[Object]:
    """Those of Deployments, and of InferenceServices less what is KServe's own."""
    for each in found:
        if each["kind"] == "Deployment":
            yield each["spec"]["template"]["spec"]
        elif each["kind"] == "InferenceService":
            predictor = each["spec"]["predictor"]
            yield {name: value for name, value in predictor.items() if name not in KSERVE_FIELDS}


def kustomized(folder: Path) -> str:
    """What is rendered out of a folder with a kustomization.yaml. Raises RuntimeError."""
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
