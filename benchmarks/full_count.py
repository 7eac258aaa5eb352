"""Ways of casting all votes of one image, by the service and by PyTorch; each from image to tally."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from carso.bundle import Bundle
from carso.inference.jobs import VotePlan
from carso.inference.pipeline import Pipeline
from carso.inference.sessions import FirstPass, Sessions
from carso_training.export.graphs import VoteGraph
from carso_training.export.weights import classifier_of, purifier_of
from carso_training.networks import Classifier, Purifier


class DeadHeat:
    """Sessions that cast every vote in earnest, then report a tie of two classes, so that no rule ends the count."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def first_pass(self, images: np.ndarray) -> FirstPass:
        return self._sessions.first_pass(images)

    def vote(self, codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        return np.arange(len(self._sessions.vote(codes, code_index, latents))) % 2


class ServiceWays:
    """The service's pipeline and graphs, without HTTP."""

    def __init__(self, bundle: Bundle, sessions: Sessions, image: np.ndarray, *, round_rows: int) -> None:
        """`image`: [1, *shape]."""
        manifest = bundle.manifest
        self._sessions = sessions
        self._image = image
        self._samples, self._latent, self._classes = manifest.samples, manifest.latent, len(manifest.classes)
        self._pipeline = Pipeline(
            DeadHeat(sessions),  # type: ignore[arg-type]
            latent=self._latent,
            classes=self._classes,
            round_rows=round_rows,
        )

    def in_ballots(self, *, risk: float) -> int:
        """As for a request whose count does not stop early: votes cast."""
        (outcome,) = self._pipeline.classify(self._image, VotePlan(samples=self._samples, risk=risk))
        return outcome.votes

    def in_one_batch(self) -> np.ndarray:
        """All votes in one run of the graph."""
        codes = self._sessions.first_pass(self._image).codes
        latents = np.random.Generator(np.random.Philox()).standard_normal((self._samples, self._latent), np.float32)
        votes = self._sessions.vote(codes, np.zeros(self._samples, np.int64), latents)
        return np.bincount(votes, minlength=self._classes)


class TorchWays:
    """The networks as they were trained, in eval and inference mode, float32."""

    def __init__(self, bundle: Bundle, image: np.ndarray) -> None:
        """`image`: [1, *shape]."""
        self._classifier: Classifier = classifier_of(bundle)
        self._purifier: Purifier = purifier_of(bundle)
        self._folded = VoteGraph(self._purifier, second_pass=self._classifier).eval()
        self._image = torch.from_numpy(image)
        self._samples, self._latent = bundle.manifest.samples, bundle.manifest.latent

    @torch.inference_mode()
    def in_a_loop(self) -> np.ndarray:
        """The published way: one decoder and one classifier call per vote."""
        code = self._code()
        votes = [
            self._classifier(self._purifier.decode(code, torch.randn(1, self._latent))).argmax(dim=1)
            for _ in range(self._samples)
        ]
        return self._tally(torch.cat(votes))

    @torch.inference_mode()
    def in_one_batch(self) -> np.ndarray:
        code = self._code().expand(self._samples, -1)
        purified = self._purifier.decode(code, torch.randn(self._samples, self._latent))
        return self._tally(self._classifier(purified).argmax(dim=1))

    @torch.inference_mode()
    def folded_in_one_batch(self) -> np.ndarray:
        """The vote graph's own arithmetic (norms folded, one code term per image), run by PyTorch."""
        same_code = torch.zeros(self._samples, dtype=torch.long)
        votes, _ = self._folded(self._code(), same_code, torch.randn(self._samples, self._latent))
        return self._tally(votes)

    @torch.inference_mode()
    def agreement(self, bundle: Bundle) -> float:
        """Share of the bundle's known votes that these networks cast alike; a sound bundle gives all but 1."""
        test = bundle.self_test
        codes = torch.from_numpy(test.codes[test.code_index])
        votes = self._classifier(self._purifier.decode(codes, torch.from_numpy(test.latents))).argmax(dim=1)
        return float((votes.numpy() == test.votes).mean())

    def _code(self) -> torch.Tensor:
        return self._purifier.encode(self._classifier.represent(self._image).representation)

    def _tally(self, votes: torch.Tensor) -> np.ndarray:
        return F.one_hot(votes, self._classifier.config.classes).sum(dim=0).numpy()
