"""The attacks that a recipe, a measurement and a bundle may name. To add one, add a file with a `Method` here.

All are untargeted attacks on images in [0, 1]. Each takes a function from images to class scores, clean images and true
labels, and returns images of the same shape inside [0, 1] and inside the eps-ball of the clean ones.
`tests/test_attacks.py` compares each of them with foolbox on the same classifier.
"""

from __future__ import annotations

import math

from carso_training.attacks.attack import Attack, Method
from carso_training.registry import entries

__all__ = ["CLEAN", "METHODS", "Attack", "Method", "attack_named"]

METHODS = entries(__name__, __path__, Method)
CLEAN = Attack(METHODS["none"])


def attack_named(name: str) -> Attack:
    """Read ``clean`` or a method and an eps, such as ``pgd-0.30``: the inverse of `Attack.name`.

    Raises ValueError, which says what is wrong with the name.
    """
    if name == CLEAN.name:
        return CLEAN
    method, _, eps = name.rpartition("-")
    known = [name for name in METHODS if name != CLEAN.method.name]
    if method not in known:
        raise ValueError(
            f"there is no attack {name!r}. Give `clean`, or one of {', '.join(known)} and an eps, as in fgsm-0.15"
        )
    try:
        attack = Attack(METHODS[method], float(eps))
    except ValueError:
        raise ValueError(f"{name!r} ends in {eps!r}, which is not an eps such as 0.15") from None
    if not math.isfinite(attack.eps) or attack.eps <= 0:
        raise ValueError(f"{name!r} ends in {eps!r}; an eps is a positive number, such as 0.15")
    if attack.name != name:
        raise ValueError(f"{name!r} is written {attack.name!r}")
    return attack
