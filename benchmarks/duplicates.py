"""How soon an attacker who searches by queries is noticed, what clean traffic is marked, and what looking costs.

    python -m benchmarks.duplicates

The test images are sent to a service with CARSO_DUPLICATES=mark as clean traffic of one key. Then RayS attacks it over
HTTP, one query a request, on the robust path, each image with keys of its own. The same is done to a service that
refuses. docs/duplicates.md has the figures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from carso import Client, RequestRefused
from carso.bundle import Bundle
from carso.inference.duplicates import REMEMBERED, Recent
from carso.inference.sessions import Sessions
from carso.settings import REFERENCE_BUNDLE
from carso_training.attacks.rays import rays
from carso_training.datasets.mnist import MNIST
from torch import Tensor

from benchmarks import servers

BATCH = 50  # images of one request of clean traffic
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """RayS, and what somebody does who knows that queries are compared."""

    name: str
    eps: float = 0.30
    keys: int = 1  # that the queries of one image are spread over, one after the other
    change: Change = lambda image, chance: image  # of each query


@dataclass
class Noticed:
    """What came of the attack on one image."""

    marks: list[bool] = field(default_factory=list)  # of each query
    refused: int = 0
    broken: bool = False

    @property
    def after(self) -> float:
        """Queries up to the first that was noticed; infinite: none was."""
        return self.marks.index(True) + 1 if True in self.marks else float("inf")


def noise(size: float) -> Change:
    """Move every value at random by up to `size`."""

    def change(image: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        return np.clip(image + chance.uniform(-size, size, image.shape), 0, 1).astype(np.float32)

    return change


def shift(most: int) -> Change:
    """Move the whole image at random by up to `most` pixels either way."""

    def change(image: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        return np.roll(image, chance.integers(-most, most + 1, 2), axis=(-2, -1))

    return change


ATTACKERS = (
    Attacker(name="RayS, eps 0.30"),
    Attacker(name="RayS, eps 0.15", eps=0.15),
    Attacker(name="with noise of 0.05 on each query", change=noise(0.05)),
    Attacker(name="with noise of 0.15 on each query", change=noise(0.15)),
    Attacker(name="with noise of 0.30 on each query", change=noise(0.30)),
    Attacker(name="with noise of 0.50 on each query", change=noise(0.50)),
    Attacker(name="with shifts by up to 1 pixel", change=shift(1)),
    Attacker(name="with shifts by up to 3 pixels", change=shift(3)),
    Attacker(name="spread over 10 keys", keys=10),
    Attacker(name="spread over 100 keys", keys=100),
)


class Keys:
    """Keys that were never used."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._used = 0

    def write(self, path: Path) -> None:
        path.write_text("".join(f"{_name(number)}: {_key(number)}\n" for number in range(self._count)))

    def take(self, count: int) -> list[str]:
        self._used += count
        return [_key(number) for number in range(self._used - count, self._used)]


def _name(number: int) -> str:
    return f"caller-{number:05}"


def _key(number: int) -> str:
    return f"key-of-a-caller-{number:05}"


def attacked(url: str, attacker: Attacker, image: Tensor, label: int, keys: list[str], *, queries: int) -> Noticed:
    """Attack one image [1, *shape] by at most `queries` queries, and then ask once about the image that was found."""
    chance = np.random.default_rng(0)
    clients = [Client(url, api_key=key) for key in keys]
    found = Noticed()

    def ask(query: np.ndarray) -> int:
        try:
            (prediction,) = clients[len(found.marks) % len(clients)].classify(query).predictions
        except RequestRefused as e:
            found.refused += 1
            found.marks.append(e.error == "near_duplicate")
            return -1
        found.marks.append(bool(prediction.near_duplicate))
        return prediction.label

    def decisions(asked: Tensor) -> Tensor:
        return torch.tensor([ask(attacker.change(query, chance)) for query in asked.numpy()])

    result = rays(decisions, image, torch.tensor([label]), eps=attacker.eps, queries=queries)
    said = Noticed(marks=list(found.marks))
    final = ask(result[0].numpy())
    said.refused, said.broken = found.refused, final not in (-1, label)
    for client in clients:
        client.close()
    return said


@contextmanager
def service(bundle: Path, keys: Keys, action: str) -> Iterator[str]:
    """Run a service with these keys; yield its URL."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        keys.write(file)
        with servers.carso(bundle, CARSO_DUPLICATES=action, CARSO_API_KEYS_FILE=str(file)) as server:
            yield f"http://127.0.0.1:{server.port}"


def marked(url: str, key: str, images: np.ndarray) -> int:
    """Send images [N, *shape] on the fast path, which looks at the same codes; count those that are marked."""
    with Client(url, api_key=key) as client:
        parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return sum(bool(each.near_duplicate) for part in parts for each in client.classify_fast(part).predictions)


def clean_traffic(url: str, keys: Keys, images: np.ndarray) -> None:
    """Print a table of what is marked of clean images."""
    order = np.random.default_rng(0).permutation(len(images))
    twice = np.random.default_rng(1).permutation(np.repeat(np.arange(len(images)), 2))
    print("\n| clean traffic of one key | images | marked | share |\n| --- | ---: | ---: | ---: |")
    for name, sent in (
        ("every test image once, in random order", order),
        ("every image twice, one after the other", np.repeat(order, 2)),
        ("every image twice, in random order", twice),
    ):
        count = marked(url, keys.take(1)[0], images[sent])
        print(f"| {name} | {len(sent)} | {count} | {count / len(sent):.2%} |", flush=True)


def table(url: str, keys: Keys, data: list[tuple[Tensor, int]], *, attackers: Sequence[Attacker], queries: int) -> None:
    """Print a row for each attacker, on a service that marks."""
    print(f"\n{len(data)} test images, at most {queries} queries each\n")
    print("| attacker | queries until noticed, median | most | never | queries marked | images broken |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for attacker in attackers:
        found = [
            attacked(url, attacker, image, label, keys.take(attacker.keys), queries=queries) for image, label in data
        ]
        after = sorted(each.after for each in found)
        seen = [each for each in after if each != float("inf")]
        marks = [mark for each in found for mark in each.marks]
        print(
            f"| {attacker.name} | {median(after):g} | {max(seen, default=float('inf')):g} | {len(after) - len(seen)} | "
            f"{np.mean(marks):.0%} of {len(marks)} | {sum(each.broken for each in found)} |",
            flush=True,
        )


def refused(
    url: str, keys: Keys, data: list[tuple[Tensor, int]], *, attackers: Sequence[Attacker], queries: int
) -> None:
    """Print a row for each attacker, on a service that refuses."""
    print("\n| attacker, where near-duplicates are refused | queries | refused | images broken |")
    print("| --- | ---: | ---: | ---: |")
    for attacker in attackers:
        found = [
            attacked(url, attacker, image, label, keys.take(attacker.keys), queries=queries) for image, label in data
        ]
        asked = sum(len(each.marks) for each in found)
        refusals = sum(each.refused for each in found)
        print(f"| {attacker.name} | {asked} | {refusals / asked:.0%} | {sum(e.broken for e in found)} |", flush=True)


def cost(bundle: Bundle, images: np.ndarray) -> None:
    """Print the microseconds that looking at one image takes, with a full memory."""
    near = bundle.manifest.near_duplicates
    assert near is not None
    codes = Sessions(bundle, device="cpu", threads=1).first_pass(images).codes
    recent = Recent(distance=near.distance, code=bundle.manifest.code)
    for image, code in zip(images, codes, strict=True):
        recent.is_near("a", image, code)
    assert len(images) > 2 * REMEMBERED
    pairs = iter([*zip(images, codes, strict=True)] * 5)
    new = min(timeit.repeat(lambda: recent.is_near("a", *next(pairs)), number=1000, repeat=9))
    last = images[0], codes[0]
    recent.is_near("a", *last)
    again = min(timeit.repeat(lambda: recent.is_near("a", *last), number=1000, repeat=9))
    print(f"\n{1e3 * new:.0f} us for a new image, {1e3 * again:.0f} us for a repeat")


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--images", type=int, default=10, help="test images that are attacked: the first ones")
    parser.add_argument("--queries", type=int, default=200, help="of one image, at most")
    parser.add_argument("--only", default="", metavar="TEXT", help="attackers whose name holds this, and nothing else")
    options = parser.parse_args()
    bundle, test = Bundle.load(options.bundle), MNIST.load("test")
    images = test.pixels().numpy()
    data = [(test.pixels(slice(row, row + 1)), int(test.labels[row])) for row in range(options.images)]
    attackers = [attacker for attacker in ATTACKERS if options.only in attacker.name]
    if not options.only:
        cost(bundle, images[: 2 * REMEMBERED + 1])
    count = 3 + options.images * sum(attacker.keys for attacker in ATTACKERS)
    for action in ("mark", "refuse"):
        keys, began = Keys(count), time.monotonic()
        with service(options.bundle, keys, action) as url:
            if action == "mark" and not options.only:
                clean_traffic(url, keys, images)
            report = table if action == "mark" else refused
            report(url, keys, data, attackers=attackers, queries=options.queries)
        print(f"\n({action}: {time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
