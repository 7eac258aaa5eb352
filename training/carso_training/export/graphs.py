"""The functions that a bundle ships, as torch modules that are exported to ONNX."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carso_training.networks import Classifier, Purifier
from carso_training.networks.bounds import UnboundedLayerError, box_of, largest_margin, leads


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

    Where a margin is positive, the first pass gives the most probable class to every image within eps, and the scores
    of all other classes stay that far below its (docs/certificate.md).
    """

    def __init__(self, classifier: Classifier, purifier: Purifier) -> None:
        """Raises UnboundedLayerError if bounds cannot be taken through the classifier."""
        super().__init__()
        self.first_pass = FirstPassGraph(classifier, purifier)
        layers = classifier.chain()
        if layers is None:
            raise UnboundedLayerError(f"the network {classifier.config.network} is not a chain of layers")
        self.layers = nn.ModuleList(layers)
        everything = box_of(torch.full((1, *classifier.config.input_shape), 0.5), torch.full((1,), 0.5))
        if not leads(layers, everything, slack=True).isfinite().all():  # those of smaller boxes are, if these are
            raise UnboundedLayerError("its bounds overflow float32")

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities, codes = self.first_pass(images)
        return probabilities, codes, largest_margin(list(self.layers), box_of(images, eps))
