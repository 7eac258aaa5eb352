"""The images, run hardened. tests/deploy/run builds them and names them in the environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.settings import REFERENCE_BUNDLE
from carso.version import __version__

from tests.deploy.containers import HARDENED, Container, docker, request, running
from tests.signals import catches
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
ATTACKED = (ROOT / "docs/samples/1-pgd-0.30.png").read_bytes()
CPU, GPU, TRAINING = (os.environ.get(f"DEPLOY_{target}_IMAGE", "") for target in ("CPU", "GPU", "TRAINING"))

needs_cpu = pytest.mark.skipif(not CPU, reason="tests/deploy/run builds the images and runs this")
needs_gpu = pytest.mark.skipif(not GPU, reason="tests/deploy/run --gpu builds the image (1.6 GB) and runs this")
needs_training = pytest.mark.skipif(not TRAINING, reason="tests/deploy/run --training builds the image and runs this")


IMAGES = [
    pytest.param(CPU, id="cpu", marks=needs_cpu),
    pytest.param(GPU, id="gpu", marks=needs_gpu),
    pytest.param(TRAINING, id="training", marks=needs_training),
]


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    with running(CPU) as started:
        yield started


@needs_cpu
def test_an_attacked_digit_is_classified_right(container: Container) -> None:
    status, answer = request(container.address, "POST", "/classify", ATTACKED)
    (prediction,) = answer["predictions"]
    assert (status, prediction["class_name"], prediction["agree"]) == (200, "1", False)


@needs_cpu
def test_the_process_is_not_root_and_has_no_capabilities(container: Container) -> None:
    status = dict(line.split(":\t") for line in container.run("cat", "/proc/1/status").stdout.splitlines())
    assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"


@needs_cpu
def test_the_server_is_the_first_process_so_that_signals_reach_it(container: Container) -> None:
    command = container.run("cat", "/proc/1/cmdline").stdout.split("\0")
    assert command[1:3] == ["/opt/carso/bin/carso", "serve"]


@needs_cpu
def test_it_writes_nothing_to_its_file_system(container: Container) -> None:
    request(container.address, "POST", "/classify", ATTACKED)
    assert container.run("touch", "/tmp/x").returncode, "the root file system is not read-only"  # noqa: S108
    assert docker("diff", container.id).stdout == ""


@needs_cpu
def test_docker_finds_it_healthy(container: Container) -> None:
    give_up = time.monotonic() + 60
    while (health := container.inspect()["State"]["Health"])["Status"] == "starting" and time.monotonic() < give_up:
        time.sleep(0.5)
    assert health["Status"] == "healthy", health


@needs_cpu
def test_the_health_check_fails_where_nothing_listens() -> None:
    command = ("--rm", "--entrypoint", "python", CPU, "/opt/healthcheck.py")
    assert docker("run", *HARDENED, *command, check=False).returncode == 1


@pytest.mark.parametrize("image", IMAGES)
def test_the_sbom_lists_every_package_of_the_image(image: str) -> None:
    path = re.search(r"--output-file (\S+)", (ROOT / "docker/Dockerfile").read_text())[1]
    assert f"--entrypoint cat carso:cpu {path} >" in (ROOT / "docs/deploy.md").read_text()
    sbom = json.loads(docker("run", "--rm", "--entrypoint", "cat", image, path).stdout)
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    main = sbom["metadata"]["component"]
    assert (main["name"], main["version"], main["licenses"][0]["license"]["id"]) == ("carso", __version__, "Apache-2.0")
    program = "import importlib.metadata as m; print(*(f'{d.name}@{d.version}' for d in m.distributions()), sep='\\n')"
    installed = docker("run", "--rm", "--entrypoint", "python", image, "-c", program).stdout.split()
    listed = [unquote(component["purl"]).removeprefix("pkg:pypi/") for component in sbom["components"]]
    assert sorted(map(_normal, [*listed, f"carso@{__version__}"])) == sorted(map(_normal, installed))
    relied_on = {entry["ref"]: entry.get("dependsOn", []) for entry in sbom["dependencies"]}
    assert relied_on[main["bom-ref"]], "what the service itself depends on"


def _normal(package: str) -> str:
    name, _, version = package.partition("@")
    return f"{re.sub('[-_.]+', '-', name).lower()}@{version}"


@needs_cpu
def test_every_line_of_its_log_is_json(container: Container) -> None:
    assert [json.loads(line) for line in container.log().splitlines()]


@needs_cpu
def test_another_bundle_can_be_mounted(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(REFERENCE_BUNDLE, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"name": "mounted"}))
    bundle.chmod(0o755)
    tmp_path.chmod(0o755)
    with running(CPU, f"--volume={bundle}:/bundle:ro") as mounted:
        assert request(mounted.address, "GET", "/info")[1]["bundle"]["name"] == "mounted"
    with running(CPU, f"--volume={bundle}:/elsewhere:ro", "--env=CARSO_BUNDLE=/elsewhere") as named:
        assert request(named.address, "GET", "/info")[1]["bundle"]["name"] == "mounted"


@needs_cpu
@pytest.mark.parametrize(
    ("setting", "status", "message"),
    [
        ("CARSO_RISK=2", 2, "CARSO_RISK"),
        ("CARSO_BUNDLE=/nowhere", 1, "/nowhere holds no manifest.json"),
        ("CARSO_DEVICE=cuda", 1, "built without CUDA"),
    ],
)
def test_what_cannot_be_served_ends_the_container_with_a_reason(setting: str, status: int, message: str) -> None:
    done = docker("run", "--rm", *HARDENED, f"--env={setting}", CPU, check=False)
    assert done.returncode == status
    assert message in done.stderr


@needs_cpu
def test_it_is_ready_after_three_seconds_of_a_processor(record_property: Callable[[str, object], None]) -> None:
    began = time.monotonic()
    with running(CPU) as ready:
        waited = time.monotonic() - began
        stat = Path(f"/proc/{ready.inspect()['State']['Pid']}/stat").read_text().rpartition(") ")[2].split()
    used = sum(map(int, stat[11:13])) / os.sysconf("SC_CLK_TCK")
    record_property("seconds from docker run to ready, and of a processor", (round(waited, 2), round(used, 2)))
    assert used < 3  # how long it takes depends on what else the machine does


@needs_cpu
def test_no_request_is_lost_at_sigterm_by_a_router_that_heeds_readiness() -> None:
    before: list[int] = []
    after: list[int] = []
    terminated, noticed = threading.Event(), threading.Event()
    with running(CPU, "--env=CARSO_DRAIN_DELAY_S=3600", "--env=CARSO_DRAIN_TIMEOUT_S=600") as container:
        address = container.address

        def call() -> None:
            """Requests one after the other, until the router has noticed."""
            while not noticed.is_set():
                outcomes = after if terminated.is_set() else before
                outcomes.append(request(address, "POST", "/classify?risk=0", ATTACKED)[0])

        with ThreadPoolExecutor() as pool:
            callers = [pool.submit(call) for _ in range(4)]
            while len(before) < 20 and not any(caller.done() for caller in callers):
                time.sleep(0.01)
            docker("kill", "--signal=TERM", container.id)
            terminated.set()
            eventually(lambda: request(address, "GET", "/readyz")[0] == 503)
            eventually(lambda: len(after) > 2 * len(callers) or any(caller.done() for caller in callers))
            noticed.set()
            assert [caller.result() for caller in callers] == [None] * 4
            long = pool.submit(call_at_length, address)  # the closing of the port finds it in flight
            eventually(lambda: 'carso_in_flight_requests{path="robust"} 1.0' in request(address, "GET", "/metrics")[1])
            docker("kill", "--signal=TERM", container.id)  # a second one skips what is left of the delay
            status = docker("wait", container.id).stdout.strip()
            assert long.result() == 200
    assert status == "0"
    assert set(before) == set(after) == {200}


def call_at_length(address: str) -> int:
    """Send one request that takes some seconds: many full counts. Returns its status."""
    body = BytesIO()
    np.save(body, np.random.default_rng(0).integers(0, 256, (32, 28, 28), np.uint8))
    headers = {"Content-Type": "application/x-npy"}
    return request(address, "POST", "/classify?risk=0&samples=10000", body.getvalue(), headers=headers)[0]


@needs_cpu
def test_docker_stop_waits_long_enough_to_tell_those_in_flight() -> None:
    with running(CPU) as container, ThreadPoolExecutor() as pool:
        address = container.address
        waiting = [pool.submit(call_at_length, address) for _ in range(3)]
        in_flight = 'carso_in_flight_requests{path="robust"} 3.0'
        while in_flight not in request(address, "GET", "/metrics")[1] and not any(caller.done() for caller in waiting):
            time.sleep(0.01)
        docker("stop", container.id)
        assert container.inspect()["State"]["ExitCode"] == 0
        assert {caller.result() for caller in waiting} <= {200, 503}


@needs_cpu
def test_sigterm_during_the_start_ends_it_at_once() -> None:
    container = Container(docker("run", "--detach", *HARDENED, "--cpus=0.2", CPU).stdout.strip())
    try:
        process = container.inspect()["State"]["Pid"]
        while not catches(process, signal.SIGTERM):
            time.sleep(0.005)
        docker("kill", "--signal=TERM", container.id)
        assert docker("wait", container.id).stdout.strip() == "0"
        assert container.log() == ""
    finally:
        docker("rm", "--force", container.id)


@needs_cpu
def test_the_image_says_what_it_is() -> None:
    (image,) = json.loads(docker("inspect", CPU).stdout)
    config = image["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["licenses"] == "Apache-2.0"
    assert labels["version"] == __version__
    assert len(labels["revision"]) == 40
    assert config["StopSignal"] == "SIGTERM"
    assert config["User"] == "10001:10001"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_as_small_as_the_page_says(image: str, record_property: Callable[[str, object], None]) -> None:
    target = image.partition(":")[2]
    page = (ROOT / "docs/deploy.md").read_text()
    number, unit = re.search(rf"^\| `{target}` \|.*\| ([\d.]+) ([MG])B \|", page, re.MULTILINE).groups()
    (built,) = json.loads(docker("inspect", image).stdout)
    (base,) = json.loads(docker("inspect", built["Config"]["Labels"]["org.opencontainers.image.base.name"]).stdout)
    megabytes = round((built["Size"] - base["Size"]) / 1e6)
    record_property(f"MB of carso:{target} over its base image", megabytes)
    assert megabytes == pytest.approx(float(number) * {"M": 1, "G": 1000}[unit], rel=0.05)


@needs_cpu
def test_onnx_runtime_is_told_to_send_nothing_home(container: Container) -> None:
    assert "ORT_DISABLE_TELEMETRY=1" in container.run("cat", "/proc/1/environ").stdout.split("\0")
    assert "telemetry" not in container.log().lower()


@needs_cpu
def test_nothing_that_builds_or_installs_is_in_it() -> None:
    tools = "gcc cc g++ make curl wget git uv hatch /opt/carso/bin/pip"
    script = f"for tool in {tools}; do command -v $tool; done; ls -d /root/.cache/* /src /dist /tmp/*"
    assert docker("run", "--rm", "--user=0", "--entrypoint=sh", CPU, "-c", script, check=False).stdout == ""


@pytest.mark.parametrize("image", IMAGES)
def test_the_packages_of_an_image_are_complete_and_go_together(image: str) -> None:
    command = ("-m", "pip", "--python", "/opt/carso/bin/python", "check")
    done = docker("run", "--rm", "--entrypoint=/usr/local/bin/python", image, *command, check=False)
    assert done.stdout == "No broken requirements found.\n"


@needs_cpu
def test_the_bundle_is_in_an_image_once() -> None:
    done = docker("run", "--rm", "--user=0", "--entrypoint=sh", CPU, "-c", "find / -xdev -name vote.onnx")
    assert done.stdout.split() == ["/bundle/vote.onnx"]


@needs_cpu
def test_the_settings_can_be_given_as_options() -> None:
    done = docker("run", "--rm", *HARDENED, CPU, "--risk=2", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "carso: --risk: '2' is not allowed; it must be 0 or a number from 1e-12 to 0.5\n",
    )
    assert docker("run", "--rm", "--entrypoint=carso", CPU, "--version").stdout == f"carso {__version__}\n"


@needs_gpu
def test_of_the_cuda_libraries_only_the_drivers_is_missing() -> None:
    script = (
        "cd /opt/carso/lib/python3.11/site-packages && "
        "LD_LIBRARY_PATH=$(find $PWD/nvidia -name lib -type d | tr '\\n' ':') "
        "ldd onnxruntime/capi/libonnxruntime_providers_cuda.so"
    )
    linked = docker("run", "--rm", "--entrypoint=sh", GPU, "-c", script).stdout
    assert "libcudart" in linked
    assert [line.split()[0] for line in linked.splitlines() if "not found" in line] in ([], ["libcuda.so.1"])


@needs_gpu
def test_the_gpu_image_refuses_to_start_without_a_gpu_and_can_be_told_to() -> None:
    done = docker("run", "--rm", *HARDENED, GPU, check=False)
    assert done.returncode == 1
    assert "no NVIDIA driver" in done.stderr
    with running(GPU, "--env=CARSO_DEVICE=auto", "--env=CARSO_ROUND_ROWS=128") as container:
        assert request(container.address, "POST", "/classify", ATTACKED)[1]["provider"] == "CPUExecutionProvider"


@needs_training
def test_the_training_image_trains_a_system_that_can_be_served(tmp_path: Path) -> None:
    from carso_training.datasets import dataset

    from tests.test_training import TINY

    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    shutil.copytree(dataset("mnist").ensure(), tmp_path / "mnist")
    for folder in (tmp_path, tmp_path / "mnist"):
        folder.chmod(0o777)
    options = (*HARDENED, "--memory=2g", "--tmpfs=/tmp", f"--volume={tmp_path}:/work")
    docker("run", "--rm", *options, TRAINING, "run", "tiny.json", "--data", "mnist", "--folder", "tiny")
    assert Bundle.load(tmp_path / "tiny/bundle").manifest.recipe["name"] == "tiny"
