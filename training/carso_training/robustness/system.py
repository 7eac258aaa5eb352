"""The differentiable system of a bundle."""

from __future__ import annotations

from carso.bundle import Bundle

from carso_training.export import weights
from carso_training.networks.system import System


def system_of(bundle: Bundle) -> System:
    """Build the system of a bundle from its safetensors, on the CPU, in float32."""
    return System(
        classifier=weights.classifier_of(bundle),
        purifier=weights.purifier_of(bundle),
        second_pass=weights.second_pass_of(bundle),
    )
