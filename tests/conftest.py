"""Fixtures that several test files share. Each worker of pytest-xdist has servers of its own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import hypothesis
import pytest

from tests import paced
from tests.bundles import COLOUR, SMALL, shared_bundle
from tests.server import SPEED, Server, serving

paced.vary("slow" if SPEED == "slow" else "")
# How long an example takes depends on the machine.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with default limits but for long counts, over a bundle of 1 x 8 x 8 images and 10 classes."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(shared_bundle(SMALL), log, max_samples=100_000, queue_rows=10_000_000) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with tight limits that refuses seeds, over a bundle of 3 x 6 x 5 images and 3 classes."""
    limits = {"max_images": 2, "max_body_bytes": 20_000, "max_pixels": 2000, "allow_seed": False, "risk": 0}
    with serving(shared_bundle(COLOUR), tmp_path_factory.mktemp("strict") / "log", **limits) as running:
        yield running


@pytest.fixture
def strict_client(strict_server: Server) -> Iterator[httpx.Client]:
    with strict_server.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def endless_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server that casts 20 000 votes a second: tests.calls.ENDLESS is under way for minutes, and nothing else of
    the robust path fits beside it."""
    limits = {"max_samples": 100_000, "queue_rows": 64 * 100_001}
    log = tmp_path_factory.mktemp("endless") / "log"
    with serving(shared_bundle(SMALL), log, per_second=20_000, **limits) as running:
        yield running


@pytest.fixture
def endless_client(endless_server: Server) -> Iterator[httpx.Client]:
    with endless_server.client() as connected:
        yield connected


@pytest.fixture(scope="session")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for one stream at a time, below a prefix, for pages of one other origin, whose clients must be quick
    with their requests. It says on both paths what is typical."""
    limits = {"max_streams": 1, "receive_timeout_s": 0.1, "typical": "all"}
    edges = {"root_path": "/vision", "cors_origins": "https://a.example"}
    with serving(shared_bundle(SMALL), tmp_path_factory.mktemp("narrow") / "log", **limits, **edges) as running:
        yield running


@pytest.fixture(scope="session")
def impatient_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server that ends a stream after a second in which nothing comes, or is taken."""
    with serving(shared_bundle(SMALL), tmp_path_factory.mktemp("impatient") / "log", stream_idle_s=1) as running:
        yield running


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: networks this small are as fast, and do not stall where a core is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LONGEST = ("test_training.py", "test_fuzz.py", "test_client.py")  # of the files whose tests share what they start


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what this run leaves out, and how to run it."""
    return "the slow tests are left out; `pytest -m slow` runs them" if config.option.markexpr == "not slow" else None
