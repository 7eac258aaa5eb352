"""The functions that a bundle ships, as torch modules that are exported to ONNX."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carso_training.networks import Classifier, Purifier
from carso_training.networks.bounds import UnboundedLayerError, box_of, margins


class FirstPassGraph(nn.Module):
    """images [B, *shape] in [0, 1] -> probabilities [B, classes], codes [B, code]."""

    def __init__(self, classifier: Classifier, purifier: Purifier) -> None:
        super().__init__()
        self.classifier = classifier.folded()
        self.code_encoder = purifier.folded_encoder()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores, representation = self.classifier(images)
        return torch.softmax(scores, dim=1), self.code_encoder(representation)


class VoteGraph(nn.Module):
    """codes [M, code], code_index [R], latents [R, latent] -> votes [R], purified [R, *shape] in [0, 1]."""

    def __init__(self, purifier: Purifier, second_pass: Classifier) -> None:
        """`second_pass`: the classifier that votes."""
        super().__init__()
        self.decoder = purifier.folded_decoder()
        self.classifier = second_pass.folded()

    def forward(self, codes: Tensor, code_index: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        purified = self.decoder(codes, code_index, latents)
        scores, _ = self.classifier(purified)
        return scores.argmax(dim=1), purified


class BoundsGraph(nn.Module):
    """images [B, *shape] in [0, 1], eps [B] -> probabilities [B, classes], codes [B, code], margins [B].

    A margin is the smallest lead of the most probable class that is proven. Where it is positive, the first pass gives
    this class to every image within eps (docs/certificate.md).
    """

    def __init__(self, classifier: Classifier, purifier: Purifier) -> None:
        """Raises UnboundedLayerError if bounds cannot be taken through the classifier."""
        super().__init__()
        self.first_pass = FirstPassGraph(classifier, purifier)
        layers = classifier.chain()
        if layers is None:
            raise UnboundedLayerError(f"the network {classifier.config.network} is not a chain of layers")
        self.layers = nn.ModuleList(layers)
        self.classes = classifier.config.classes

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities, codes = self.first_pass(images)
        labels = probabilities.argmax(dim=1)
        leads = margins(list(self.layers), box_of(images, eps), labels, slack=True)
        own = torch.arange(self.classes) == labels.unsqueeze(1)
        return probabilities, codes, torch.where(own, torch.inf, leads).amin(dim=1)
