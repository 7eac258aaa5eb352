"""The two functions that a bundle ships, as torch modules that are exported to ONNX.

They compute what the networks compute, in a cheaper order: batch norms, which follow the activation here, are folded
into the next layer, and in the decoder's first layer the part that depends on the code is computed once per image, not
once per vote.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carso_training.networks import Classifier, Purifier

OPSET = 20


def fold(norm: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear:
    """The one Linear that equals `linear` after `norm` in eval mode. Computed in float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    weight = linear.weight.double()
    folded = nn.Linear(linear.in_features, linear.out_features)
    folded.weight.data = (weight * scale).float()
    folded.bias.data = (linear.bias.double() + weight @ shift).float()
    return folded


def mish(x: Tensor) -> Tensor:
    """x * tanh(softplus(x)), by way of one sigmoid: ONNX Runtime has a fast kernel for that, and none for Mish.

    With s = sigmoid(-x)^2 = (1 + e^x)^-2 the factor tanh(log(1 + e^x)) is (1 - s) / (1 + s).
    """
    s = torch.sigmoid(-x).square()
    return x * (1 - s) / (1 + s)


class FoldedClassifier(nn.Module):
    """The classifier in eval mode with its standardisation and batch norms folded: Linear, Mish, Linear, Mish, ..."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        first, *rest = [*classifier.hidden, classifier.last]
        config = classifier.config
        standardised = nn.Linear(first.in_features, first.out_features)
        standardised.weight.data = (first.weight.double() / config.std).float()
        shift = first.weight.double().sum(dim=1) * (config.mean / config.std)
        standardised.bias.data = (first.bias.double() - shift).float()
        folded = [fold(norm, linear) for norm, linear in zip(classifier.norms, rest, strict=True)]
        self.layers = nn.ModuleList([standardised, *folded])

    def forward(self, flat_images: Tensor) -> list[Tensor]:
        """The Mish outputs, one per layer; the last holds the logits."""
        activations, x = [], flat_images
        for layer in self.layers:
            x = mish(layer(x))
            activations.append(x)
        return activations


def _chain(layers: nn.Sequential) -> tuple[list[nn.Linear], float]:
    """The Linears of `Linear, LeakyReLU, BatchNorm, ..., Linear` with each norm folded forward; and the slope."""
    linears: list[nn.Linear] = []
    norm: nn.BatchNorm1d | None = None
    slope = 0.0
    for layer in layers:
        if isinstance(layer, nn.Linear):
            linears.append(fold(norm, layer) if norm else layer)
            norm = None
        elif isinstance(layer, nn.BatchNorm1d):
            norm = layer
        elif isinstance(layer, nn.LeakyReLU):
            slope = layer.negative_slope
    return linears, slope


class FirstPassGraph(nn.Module):
    """images [B, *shape] -> probabilities [B, classes], codes [B, code]."""

    def __init__(self, classifier: Classifier, purifier: Purifier) -> None:
        super().__init__()
        self.classifier = FoldedClassifier(classifier)
        linears, self.slope = _chain(purifier.code_encoder)
        self.code_encoder = nn.ModuleList(linears)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        activations = self.classifier(images.flatten(1))
        x = torch.cat(activations, dim=1)
        *hidden, last = self.code_encoder
        for layer in hidden:
            x = F.leaky_relu(layer(x), self.slope)
        return torch.softmax(activations[-1], dim=1), torch.sigmoid(last(x))


class VoteGraph(nn.Module):
    """codes [M, code], code_index [R], latents [R, latent] -> votes [R], purified [R, *shape]."""

    def __init__(self, classifier: Classifier, purifier: Purifier) -> None:
        super().__init__()
        self.classifier = FoldedClassifier(classifier)
        (first, *rest), self.slope = _chain(purifier.decoder)
        code = purifier.config.code
        self.from_code = nn.Linear(code, first.out_features)
        self.from_code.weight.data, self.from_code.bias.data = first.weight.data[:, :code].clone(), first.bias.data
        self.from_latent = nn.Linear(first.in_features - code, first.out_features, bias=False)
        self.from_latent.weight.data = first.weight.data[:, code:].clone()
        self.rest = nn.ModuleList(rest)
        self.shape = purifier.config.input_shape

    def forward(self, codes: Tensor, code_index: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        x = self.from_latent(latents) + self.from_code(codes).index_select(0, code_index)
        for layer in self.rest:
            x = layer(F.leaky_relu(x, self.slope))
        purified = torch.sigmoid(x)
        return self.classifier(purified)[-1].argmax(dim=1), purified.unflatten(1, self.shape)
