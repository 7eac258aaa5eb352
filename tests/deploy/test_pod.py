"""The manifests' Deployment, run as a pod by podman: with its user, its read-only root, its limits and its Secret."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="pip install '.[deploy]'")

import yaml
from carso.settings import REFERENCE_BUNDLE

from tests.deploy.containers import START_WITHIN, docker, request
from tests.deploy.manifests import Object, objects, pod_specs, rendered, rendered_with

ROOT = Path(__file__).parents[2]
ATTACKED = (ROOT / "docs/samples/1-pgd-0.30.png").read_bytes()
BUNDLE_IMAGE = "carso-bundle:check"
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""

pytestmark = [
    pytest.mark.skipif("DEPLOY_CPU_IMAGE" not in os.environ, reason="tests/deploy/run builds the images and runs this"),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is missing"),
]


@dataclass(frozen=True)
class Podman:
    """A podman with all that it keeps in one folder."""

    folder: Path

    def __call__(self, *arguments: str, check: bool = True) -> str:
        folders = (f"--{name}={self.folder / name}" for name in ("root", "runroot", "tmpdir"))
        environment = os.environ | {"CONTAINERS_CONF": str(self.folder / "containers.conf")}
        command = ["podman", *folders, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return (done.stderr if arguments[0] == "logs" else done.stdout).strip()


@dataclass(frozen=True)
class Pod:
    podman: Podman
    container: str
    address: str

    def file(self, path: str) -> str:
        return self.podman("exec", self.container, "cat", path)


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    folder = Path(os.environ["DEPLOY_WORK"]) / "podman"
    folder.mkdir()
    (folder / "containers.conf").write_text(CONFIGURATION.format(folder=folder))
    podman = Podman(folder)
    saved = folder / "image.tar"
    docker("save", "--output", str(saved), os.environ["DEPLOY_CPU_IMAGE"], _bundle_image(folder))
    podman("load", "--quiet", "--input", str(saved))
    saved.unlink()
    try:
        yield podman
    finally:
        podman("pod", "rm", "--all", "--force", check=False)
        podman("network", "prune", "--force", check=False)


def _bundle_image(folder: Path) -> str:
    """An image as k8s/components/bundle describes it: the bundle under another name, and a cp."""
    context = folder / "bundle-image"
    bundle = context / "bundle"
    shutil.copytree(REFERENCE_BUNDLE, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"name": "out-of-an-image"}))
    shutil.copy(shutil.which("busybox"), context / "cp")
    (context / "Dockerfile").write_text("FROM scratch\nCOPY cp /bin/cp\nCOPY --chmod=755 bundle /bundle\n")
    docker("build", "--quiet", "--tag", BUNDLE_IMAGE, str(context))
    return BUNDLE_IMAGE


@pytest.fixture(scope="module")
def pod(podman: Podman) -> Iterator[Pod]:
    """One replica of the cpu overlay, with API keys and a bundle of its own; the rest of Kubernetes is not here."""
    found = objects(rendered_with("cpu", ("api-keys", "bundle"), podman.folder / "overlay"))
    (deployment,) = (each for each in found if each["kind"] == "Deployment")
    data = {"keys": b64encode(b"a-key-of-this-test-alone").decode()}
    keys = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "carso-api-keys"}, "data": data}
    played = podman.folder / "played.yaml"
    played.write_text(yaml.safe_dump_all([keys, _for_podman(deployment)]))
    podman("play", "kube", str(played))
    container = podman("ps", "--quiet", "--filter", "name=carso-pod-0-carso")
    address = podman("inspect", container, "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
    give_up = time.monotonic() + START_WITHIN
    while time.monotonic() < give_up:
        try:
            if request(address, "GET", "/readyz")[0] == 200:
                break
        except OSError:
            time.sleep(0.1)
    else:
        pytest.fail(podman("logs", container))
    yield Pod(podman, container, address)


def _for_podman(deployment: Object) -> Object:
    """The same less what podman takes for something else: it publishes every port on the host, and it probes with
    curl, which the image does not have. And it is told to keep init containers, as Kubernetes does, and not to restart
    one that has done its work: some podmans do, and wait for its end in vain if the copy is quick."""
    deployment["spec"]["replicas"] = 1
    deployment["metadata"]["annotations"] = {"io.podman.annotations.init.container.type": "always"}
    spec = deployment["spec"]["template"]["spec"]
    spec["restartPolicy"] = "OnFailure"
    (container,), (copier,) = spec["containers"], spec["initContainers"]
    for name in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
        del container[name]
    container["image"] = f"localhost/{os.environ['DEPLOY_CPU_IMAGE']}"
    copier["image"] = f"localhost/{BUNDLE_IMAGE}"
    return deployment


def test_the_pod_classifies_for_whoever_has_a_key(pod: Pod) -> None:
    headers = {"Content-Type": "image/png"}
    status, _ = request(pod.address, "POST", "/classify", ATTACKED, headers=headers)
    assert status == 401
    # of the file, because some podmans write a Secret's data there as they are, in base64
    headers["Authorization"] = f"Bearer {pod.file('/etc/carso/keys')}"
    status, answer = request(pod.address, "POST", "/classify", ATTACKED, headers=headers)
    assert status == 200, answer
    (prediction,) = answer["predictions"]
    assert (prediction["class_name"], prediction["agree"]) == ("1", False)


def test_the_pod_serves_the_bundle_that_the_init_container_copied(pod: Pod) -> None:
    headers = {"Authorization": f"Bearer {pod.file('/etc/carso/keys')}"}
    assert request(pod.address, "GET", "/info", headers=headers)[1]["bundle"]["name"] == "out-of-an-image"


@pytest.mark.parametrize("overlay", ["cpu", "kserve"])
def test_the_pod_answers_every_probe_of_the_manifests(pod: Pod, overlay: str) -> None:
    (container,) = next(pod_specs(objects(rendered(overlay))))["containers"]
    for kind in ("startup", "readiness", "liveness"):
        assert request(pod.address, "GET", container[f"{kind}Probe"]["httpGet"]["path"])[0] == 200


def test_the_pod_runs_with_the_rights_that_the_manifest_leaves(pod: Pod) -> None:
    status = dict(line.split(":\t") for line in pod.file("/proc/1/status").splitlines())
    assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # a filter
    (root,) = (line.split() for line in pod.file("/proc/1/mounts").splitlines() if line.split()[1] == "/")
    assert "ro" in root[3].split(",")


def test_the_pod_has_the_memory_that_the_manifest_gives(pod: Pod) -> None:
    assert pod.podman("inspect", pod.container, "--format", "{{.HostConfig.Memory}}") == str(512 * 2**20)


def test_the_pod_leaves_in_good_order_within_its_grace_period(pod: Pod) -> None:
    pod.podman("stop", "--time", "45", pod.container)
    assert pod.podman("inspect", pod.container, "--format", "{{.State.ExitCode}}") == "0"
