"""The recipe and the differentiable system of a bundle."""

from __future__ import annotations

from carso.bundle import MANIFEST, Bundle
from pydantic import ValidationError

from carso_training.errors import RecipeError
from carso_training.export import weights
from carso_training.networks.system import System
from carso_training.recipe import Recipe


def system_of(bundle: Bundle) -> System:
    """Build the system of a bundle from its safetensors, on the CPU, in float32."""
    return System(
        classifier=weights.classifier_of(bundle),
        purifier=weights.purifier_of(bundle),
        second_pass=weights.second_pass_of(bundle),
    )


def recipe_of(bundle: Bundle) -> Recipe:
    """Return the recipe in a bundle's manifest. Raises RecipeError if it is none of this release."""
    try:
        return Recipe.model_validate(bundle.manifest.recipe)
    except ValidationError as e:
        raise RecipeError(
            f"{bundle.folder / MANIFEST} holds no recipe of this release: {e.errors()[0]['msg']}"
        ) from None
