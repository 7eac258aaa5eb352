"""The Dockerfile, its lock files and the compose files: whatever needs no daemon to be checked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="pip install '.[deploy]'")

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE = ("docker-compose.yml", "compose.gpu.yml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The extras that a lock file holds beside the base install.
LOCKS = {"cpu": ["cpu", "grpc"], "gpu": ["gpu", "grpc"], "training": ["cpu", "train"]}


def locked(name: str) -> dict[str, str]:
    """Versions by package, without what says how one was built (+cpu)."""
    return dict(
        re.findall(r"^([\w-]+)==([^\s+]+)", (ROOT / f"docker/requirements-{name}.txt").read_text(), re.MULTILINE)
    )


def pinned() -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


needs_compose = pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is missing")


def composed(*files: str, **variables: str) -> dict[str, Any]:
    """Read the files together, as compose 1.29 does."""
    command = [
        "docker-compose",
        *(option for file in files for option in ("--file", file)),
        "--profile",
        "load",
        "config",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="pip install '.[deploy]'")
def test_hadolint_accepts_the_dockerfile() -> None:
    done = subprocess.run(["hadolint", ROOT / "docker/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_what_the_project_asks_for(name: str) -> None:
    """Run docker/lock after a change of the dependencies."""
    names = {*names_of(PROJECT["dependencies"]), *names_of([f"carso[{','.join(LOCKS[name])}]"])}
    assert names <= set(locked(name))
    assert len({"onnxruntime", "onnxruntime-gpu"} & set(locked(name))) == 1


def names_of(requirements: list[str]) -> list[str]:
    """Names of packages, with those of the project's own extras in the place of these."""
    found = []
    for requirement in requirements:
        if extras := re.match(r"carso\[([\w,]+)\]", requirement):
            for extra in extras[1].split(","):
                found += names_of(PROJECT["optional-dependencies"][extra])
        else:
            found.append(re.match(r"[\w-]+", requirement)[0])
    return found


def test_every_package_of_every_extra_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    names = {*names_of(PROJECT["dependencies"]), *(name for extra in extras for name in names_of([f"carso[{extra}]"]))}
    assert names <= set(pinned())


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_the_versions_that_the_tests_run_with(name: str) -> None:
    pins = pinned()
    assert pins["onnxruntime"] == pins["onnxruntime-gpu"]
    assert {package: version for package, version in locked(name).items() if package in pins}.items() <= pins.items()


@pytest.mark.parametrize("name", [*LOCKS, "build", "sbom"])
def test_every_file_of_a_lock_is_known_by_its_hash(name: str) -> None:
    lock = (ROOT / f"docker/requirements-{name}.txt").read_text()
    for package in re.split(r"\n(?=\w)", lock.partition("docker/lock\n")[2]):
        assert "--hash=sha256:" in package, package


def test_everything_that_an_image_installs_is_locked() -> None:
    installs = re.findall(r"pip[^\n]* install (?:[^\\\n]|\\\n)*", DOCKERFILE)
    assert len(installs) == 6
    assert all("--require-hashes" in install or "--no-index" in install for install in installs)


def test_the_training_image_has_torch_as_built_for_cpus() -> None:
    assert f"\ntorch=={pinned()['torch']}+cpu " in (ROOT / "docker/requirements-training.txt").read_text()


def test_images_are_labelled_with_the_version_of_the_project() -> None:
    assert re.search(r"ARG VERSION=(\S+)", DOCKERFILE)[1] == PROJECT["version"]


@pytest.mark.skipif(shutil.which("dclint") is None, reason="tests/deploy/run installs dclint")
def test_the_compose_files_are_of_the_current_schema(tmp_path: Path) -> None:
    assert _against_the_schema([ROOT / file for file in COMPOSE]) == []
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text("services: {a: {image: a, misspelt: 1}}\n")
    assert len(_against_the_schema([wrong])) == 1


def _against_the_schema(files: list[Path]) -> list[str]:
    done = subprocess.run(["dclint", "--formatter", "json", *files], capture_output=True, text=True)
    results = json.loads(done.stdout)
    assert {Path(result["filePath"]).name for result in results} == {file.name for file in files}
    messages = [message for result in results for message in result["messages"]]
    return [message["message"] for message in messages if message["rule"] in ("invalid-schema", "invalid-yaml")]


@needs_compose
def test_on_a_gpu_the_load_needs_no_other_image_than_the_service() -> None:
    services = composed(*COMPOSE)["services"]
    assert services["load"]["image"] == services["carso"]["image"] == "carso:gpu"
    assert services["carso"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"


@needs_compose
def test_the_bundle_that_the_page_shows_is_mounted() -> None:
    (bundle,) = re.findall(r"`BUNDLE=(\S+)`", (ROOT / "docs/deploy.md").read_text())
    assert f"{ROOT / bundle}:/bundle:ro" in composed(COMPOSE[0], BUNDLE=bundle)["services"]["carso"]["volumes"]


@needs_compose
def test_a_machine_of_one_processor_can_have_the_stack() -> None:
    assert composed(COMPOSE[0], SERVICE_CPUS="1")["services"]["carso"]["cpus"] == 1


def test_docker_and_compose_leave_the_service_the_time_to_drain() -> None:
    waits = 10  # what `docker stop` waits
    assert int(re.search(r"CARSO_DRAIN_TIMEOUT_S=(\d+)", DOCKERFILE)[1]) + 1 < waits
    service = yaml.safe_load((ROOT / COMPOSE[0]).read_text())["services"]["carso"]
    assert int(service["stop_grace_period"].removesuffix("s")) > int(service["environment"]["CARSO_DRAIN_TIMEOUT_S"])


def test_every_image_that_is_built_names_a_target_of_the_dockerfile() -> None:
    targets = re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE)
    for file in COMPOSE:
        service = yaml.safe_load((ROOT / file).read_text())["services"]["carso"]
        assert service["build"]["target"] in targets
        assert service["image"] == f"carso:{service['build']['target']}"
