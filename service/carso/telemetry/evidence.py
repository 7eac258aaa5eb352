"""Evidence of an attack: a sequential test of how often images show a sign of one, valid at every moment.

Signs are that the two paths disagree, and that a label is not proven (``carso.telemetry.alarms``).

**Promise.** Let p be a rate such that, whatever happened before, the chance that the next image shows the sign is at
most p. Then the chance that `Evidence(p).value` ever reaches 1/a, over the whole life of the object, is at most
a. It may be looked at after each image, and images need not be independent.

**Proof.** Write x = 1 if an image shows the sign, else 0. For a rate q > p, one image multiplies a bet on q by
f(x) = q/p if x = 1, and (1 - q)/(1 - p) if x = 0. If the chance of x = 1 is r <= p, the mean of f is
r q/p + (1 - r)(1 - q)/(1 - p), which rises with r and is 1 at r = p. So the bet is a supermartingale that begins at 1.

An attack begins at a moment that nobody knows, and by then a bet that began with the process has lost nearly all of
its stake to clean traffic. So a stake of 1 is spread over bets on several rates, and over all moments at which a bet
may begin. After n images, t(n) = 1 / (1 + log(1 + n)) of it is still in hand, and t(n - 1) - t(n) is staked just
before image n. A mixture of supermartingales, together with what is in hand, is a supermartingale that begins at 1 and
is never negative. Its chance of ever reaching 1/a is at most a, by Ville's inequality. A ceiling only lowers it. QED.

The bets are those of Waudby-Smith and Ramdas (2024, arXiv:2010.09686), on a Bernoulli mean. A detector that restarts
its bets without sharing out one stake (CUSUM, Shiryaev-Roberts, an e-detector) notices an attack a little sooner. But
however high its threshold, it raises a false alarm in the end: it bounds how often that happens, and not whether it
ever does. The price of the promise is about log(n) nats more of evidence for an attack that begins at image n.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, lgamma, log, log1p, log10

from carso.board.whole import Cell, Numbers, OwnCell

# The share of the images that an attack makes show the sign, beyond those that show it anyway.
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)
CEILING = 1e6  # of the evidence, so that it falls again within minutes once an attack is over
# The chance of a false alarm is at most 1 %: 0.5 % that the true clean rate is above its bound, and 0.5 % that the
# evidence ever reaches 200 although it is not.
BOUND_FAILS = 0.005
ALARM = 200.0
_BEGINNING: Numbers = (0, 1.0, *(0.0 for _ in SHARES))


class Evidence:
    """Evidence that more images show a sign than a rate says; the promise is that of the module.

    Workers that share its cell make one test of all their images, whose promise holds for as long as the cell is there.
    """

    def __init__(self, rate: float, cell: Cell | None = None) -> None:
        """`rate`: in (0, 1), the null hypothesis. `cell`: keeps the bets; None: one of this process alone."""
        if not 0 < rate < 1:
            raise ValueError(f"a rate of {rate} is not between 0 and 1")
        rates = [rate + (1 - rate) * share for share in SHARES]
        self._won = [other / rate for other in rates]
        self._lost = [(1 - other) / (1 - rate) for other in rates]
        self._cell = cell or OwnCell()  # how many images were seen, what is in hand, and the bets

    def add(self, shown: bool) -> None:
        """Take note of one image. Takes the same time however many came before."""
        self.add_all((shown,))

    def add_all(self, shown: Iterable[bool]) -> None:
        """Take note of several images, one after the other."""

        def noted(numbers: Numbers) -> Numbers:
            seen, in_hand, *bets = numbers or _BEGINNING
            for one in shown:
                seen += 1
                before, in_hand = in_hand, 1 / (1 + log1p(seen))
                staked = (before - in_hand) / len(SHARES)
                factors = self._won if one else self._lost
                bets = [(bet + staked) * factor for bet, factor in zip(bets, factors, strict=True)]
                if one and (total := sum(bets)) > CEILING:
                    bets = [bet * (CEILING / total) for bet in bets]
            return seen, in_hand, *bets

        self._cell.change(noted)

    @property
    def value(self) -> float:
        """The evidence: 1 at the start, and seldom much above it without an attack."""
        _, in_hand, *bets = self._cell.read() or _BEGINNING
        return sum(bets) + in_hand

    @property
    def log10(self) -> float:
        """Its decimal logarithm."""
        return log10(self.value)


def upper_bound(count: int, of: int, *, fails: float = BOUND_FAILS) -> float:
    """Bound the rate that `count` of `of` independent images came from (Clopper and Pearson, 1934).

    The true rate is above the bound in at most a share `fails` of such measurements. In (0, 1].
    """
    if count >= of:
        return 1.0
    low, high = count / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _at_most(count, of, middle) < fails else (middle, high)
    return high


def _at_most(count: int, of: int, rate: float) -> float:
    """Return the chance of at most `count` of `of` at a rate in (0, 1)."""
    return sum(
        exp(lgamma(of + 1) - lgamma(k + 1) - lgamma(of - k + 1) + k * log(rate) + (of - k) * log1p(-rate))
        for k in range(count + 1)
    )
